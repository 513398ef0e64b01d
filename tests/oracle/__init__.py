"""Plain re-statements of other simulators, against which the package is compared."""
