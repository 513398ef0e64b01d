"""Execution-time models fitted to what a server measured, and how far to trust them."""

from __future__ import annotations

from vidur_simpy.calibration.calibration import Calibration, calibrate
from vidur_simpy.calibration.uncertainty import simulate_with_uncertainty

__all__ = ["Calibration", "calibrate", "simulate_with_uncertainty"]
