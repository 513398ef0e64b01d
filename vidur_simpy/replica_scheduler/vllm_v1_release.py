"""What one vLLM release decides differently from another, as switches."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vidur_simpy.errors import unknown_name

__all__ = ["VLLM_VERSIONS", "Release", "release_of"]

#: Releases whose rules are known, oldest first.
VLLM_VERSIONS = ("0.9.2", "0.11.2", "0.15.1", "0.19.1", "0.23.0", "0.27.1", "0.32.0")

# The oldest of these releases that has a rule.
_SINCE = {
    "refunds_planned_victims": "0.11.2",
    "stops_at_a_prompt_above_the_budget": "0.15.1",
    "has_admission_gate": "0.19.1",
    "reuses_blank_blocks_first": "0.23.0",
    "has_watermark": "0.27.1",
    "moves_back_for_any_victim": "0.32.0",
    "spares_a_lone_request_the_cap": "0.32.0",
    "has_adaptive_cap": "0.32.0",
    "has_max_num_active_seqs": "0.32.0",
}


@dataclass(frozen=True)
class Release:
    """The rules of one release.

    Attributes
    ----------
    refunds_planned_victims : bool
        A victim that was planned in the same step returns its tokens to the budget, and the scan
        moves back by one; otherwise the request behind it is passed over.
    stops_at_a_prompt_above_the_budget : bool
        Without chunked prefill, a prompt that does not fit the budget blocks those behind it.
    has_admission_gate : bool
        `scheduler_reserve_full_isl` has an effect.
    reuses_blank_blocks_first : bool
        Freed blocks without content are reused before all cached ones.
    has_watermark : bool
    moves_back_for_any_victim : bool
        The scan moves back for victims that were not planned, too.
    spares_a_lone_request_the_cap : bool
        `long_prefill_token_threshold` is lifted while there is only one request.
    has_adaptive_cap, has_max_num_active_seqs : bool
    """

    refunds_planned_victims: bool
    stops_at_a_prompt_above_the_budget: bool
    has_admission_gate: bool
    reuses_blank_blocks_first: bool
    has_watermark: bool
    moves_back_for_any_victim: bool
    spares_a_lone_request_the_cap: bool
    has_adaptive_cap: bool
    has_max_num_active_seqs: bool


def release_of(vllm_version: str) -> Release:
    """Return the rules of a release.

    Raises
    ------
    ConfigError
        If its rules are not known; the message names the nearest that are.

    Examples
    --------
    >>> release_of("0.19.1").has_admission_gate, release_of("0.15.1").has_admission_gate
    (True, False)
    """
    if vllm_version not in VLLM_VERSIONS:
        raise unknown_name("vllm_version", vllm_version, VLLM_VERSIONS)
    age = VLLM_VERSIONS.index
    return Release(
        **{rule.name: age(vllm_version) >= age(_SINCE[rule.name]) for rule in fields(Release)}
    )
