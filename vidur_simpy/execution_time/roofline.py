"""Execution time from the sheets of model and device, at fitted efficiencies."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pydantic import Field

from vidur_simpy.execution_time.factors import RooflineFactors
from vidur_simpy.execution_time.operators import (
    Kernels,
    Links,
    Mixture,
    Mlp,
    attended,
    attention_of,
)
from vidur_simpy.validation import configuration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vidur_simpy.deployment import Deployment
    from vidur_simpy.entities import PrefillChunk
    from vidur_simpy.execution_time import BatchCounts
    from vidur_simpy.hardware import Device

__all__ = ["Roofline", "RooflineFactors", "RooflineStageTime"]


class Table(dict[int, float]):
    """The values of a function of a number, each computed when it is first asked for."""

    def __init__(self, function: Callable[[int], float]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, number: int) -> float:
        value = self[number] = self._function(number)
        return value


@configuration
class Roofline:
    """Stage times of any model from model and device sheets, without any profile.

    Each kernel takes the smooth maximum of its compute time and its memory time at fitted shares
    of the device's peaks, plus a constant; `RooflineStageTime` names the operators. Weights and
    KV cache have the precisions of the deployment. A set of fitted factors was 2 to 4 % off on
    average for the Llama iterations it was made of on A100, H100, H200 and L40S (RTX PRO 6000 and
    B200: 2 to 5 %), 5 to 8 % for mixtures of experts on A100, H100 and H200 (B200: 15 %), 2 to 6 %
    for dense models that it had not seen (``tests/benchmarks/roofline_accuracy.py``), and 5 to 11 %
    for weights in fp8. Weights of 4 bits, int8, pipeline transfers, expert parallelism and devices
    that were not fitted are extrapolated; caches in fp8 are read slower by Hopper than said here
    (attention of decodes by up to a quarter).

    Parameters
    ----------
    cpu_overhead : float
        Seconds of CPU time per iteration, spent in the first stage. Servers were measured between
        0 and 3 ms. With the default of 2 ms a steady state of even batches was 5 to 9 % off on
        average in the time per output token of 98 vLLM runs that NVIDIA published with
        aiconfigurator-core 0.12 (Llama-70B in fp8 on H100 and H200, Qwen3-32B on H100), without it
        8 to 15 %.
    factors : RooflineFactors, str or None
        The fitted shares, or the name of a set; by default those of the device.
    expert_imbalance : float
        With expert parallelism, the load of the busiest device as a multiple of the mean. It is
        that of the routing, which nobody but the user knows; 1 is perfectly even.

    Examples
    --------
    >>> from vidur_simpy.hardware import Device
    >>> Roofline().factors_name(Device.from_name("h100-pcie"))
    'hopper'
    """

    cpu_overhead: float = Field(default=0.002, ge=0)
    factors: RooflineFactors | str | None = None
    expert_imbalance: float = Field(default=1.0, ge=1)

    def __post_init__(self) -> None:
        if isinstance(self.factors, str):
            RooflineFactors.from_name(self.factors)

    def factors_for(self, device: Device) -> RooflineFactors:
        """Return the factors used on a device."""
        if self.factors is None:
            return RooflineFactors.of_device(device)
        if isinstance(self.factors, str):
            return RooflineFactors.from_name(self.factors)
        return self.factors

    def factors_name(self, device: Device) -> str:
        """Return the name of the set of factors used on a device."""
        return self.factors_for(device).name

    def for_replica(self, deployment: Deployment) -> RooflineStageTime:
        """Return the stage times of a replica."""
        factors = self.factors_for(deployment.device)
        return RooflineStageTime(deployment, factors, self.cpu_overhead, self.expert_imbalance)


class RooflineStageTime:
    """The roofline of one replica: call it with a batch and a stage for the seconds.

    Every stage takes its share of the layers; the first one also the CPU overhead, the last one
    the LM head, all but the last one the transfer to the next. The embedding lookup, the final
    norm and the sampling are not counted.

    What depends on the number of tokens alone is computed once per number and kept.

    Attributes
    ----------
    factors_name : str
        The set of fitted factors in use.
    """

    def __init__(
        self,
        deployment: Deployment,
        factors: RooflineFactors,
        cpu_overhead: float,
        expert_imbalance: float = 1.0,
    ) -> None:
        model, num_stages = deployment.model, deployment.pipeline_parallel_size
        self.factors_name = factors.name
        self._kernels = Kernels(deployment.device, factors)
        self._links = Links(deployment, factors)
        self._attention = attention_of(deployment, self._kernels)
        self._mlp = Mlp(deployment, self._kernels, model.intermediate_size)
        shared = model.num_shared_experts * model.moe_intermediate_size
        self._shared_experts = Mlp(deployment, self._kernels, shared)
        self._mixture = Mixture(deployment, self._kernels, expert_imbalance)
        self._last_stage = num_stages - 1
        self._num_layers = deployment.layers_per_stage
        self._num_sliding = model.num_sliding_layers / num_stages
        self._num_full = self._num_layers - self._num_sliding
        self._num_plain = model.num_plain_layers / num_stages
        self._num_mixtures = model.num_mixture_layers / num_stages
        self._window = model.sliding_window
        self._hidden_size = model.hidden_size
        self._vocabulary = model.vocab_size / deployment.tensor_parallel_size
        self._cpu_overhead = cpu_overhead
        self._prefill_time = self._attention.prefill_time
        per_context = self._attention.per_decode_context
        self._per_context = self._num_full * per_context
        self._per_window = self._num_sliding * per_context
        self._fixed_times = [
            Table(functools.partial(self.fixed_time, stage_id)) for stage_id in range(num_stages)
        ]
        self._decode_starts = Table(lambda num_decodes: self.decode_time(num_decodes, 0))
        self._lm_head_times = Table(self.lm_head_time)

    def __call__(self, batch: BatchCounts, stage_id: int) -> float:
        """Return the seconds that a stage, counted from 0, takes for a batch."""
        num_tokens, num_decodes = batch.num_tokens, batch.num_decodes
        context, prefills = batch.decode_context, batch.prefills
        time = self._fixed_times[stage_id][num_tokens]
        if num_decodes:
            time += self._decode_starts[num_decodes] + self._per_context * context
            if self._per_window:
                most = num_decodes * self._window
                time += self._per_window * (context if context < most else most)
        if prefills:
            if self._num_sliding:
                time += self.prefill_time(prefills)
            else:
                # As prefill_time, from the sums that a batch keeps anyway.
                time += self._num_full * self._prefill_time(
                    batch.num_attention_pairs - context,
                    num_tokens - num_decodes,
                    batch.total_context - context,
                )
        if stage_id == self._last_stage:
            time += self._lm_head_times[num_decodes + len(prefills)]
        return time

    def operators(self, batch: BatchCounts, stage_id: int) -> dict[str, float]:
        """Return the seconds of a stage by operator; together they are its time."""
        times = self.token_operators(batch.num_tokens)
        if stage_id == 0:
            times["cpu_overhead"] = self._cpu_overhead
        if batch.num_decodes:
            times["decode_attention"] = self.decode_time(batch.num_decodes, batch.decode_context)
        if batch.prefills:
            times["prefill_attention"] = self.prefill_time(batch.prefills)
        if stage_id < self._last_stage:
            times["send"] = self._links.send_time(batch.num_tokens)
        else:
            times["lm_head"] = self.lm_head_time(batch.num_decodes + len(batch.prefills))
        return times

    def fixed_time(self, stage_id: int, num_tokens: int) -> float:
        """Return the part of a stage's time that depends on the number of tokens alone."""
        time = sum(self.token_operators(num_tokens).values())
        if stage_id == 0:
            time += self._cpu_overhead
        if stage_id < self._last_stage:
            time += self._links.send_time(num_tokens)
        return time

    def token_operators(self, num_tokens: int) -> dict[str, float]:
        """Return the operators of a stage's layers that depend on the number of tokens alone."""
        kernels, links = self._kernels, self._links
        # A norm reads and writes the hidden and the residual state.
        norm = kernels.elementwise_time(4 * num_tokens * self._hidden_size)
        times = {
            "attention_projections": self._num_layers
            * self._attention.projections_time(num_tokens),
            "norms": self._num_layers * 2 * norm,
            "mlp": self._num_plain * self._mlp.time(num_tokens),
            "all_reduce": self._num_layers * 2 * links.all_reduce_time(num_tokens),
        }
        if self._num_mixtures:
            shared = self._shared_experts.time(num_tokens)
            times["mlp"] += self._num_mixtures * shared
            times["router"] = self._num_mixtures * self._mixture.router_time(num_tokens)
            times["experts"] = self._num_mixtures * self._mixture.time(num_tokens)
            times["all_to_all"] = self._num_mixtures * links.all_to_all_time(num_tokens)
        return times

    def decode_time(self, num_decodes: int, context: int) -> float:
        """Return the attention of a stage's layers over all decodes.

        With a sliding window, the sequences are taken to be equally long.
        """
        start = self._num_layers * self._attention.decode_time(num_decodes)
        in_window = min(context, num_decodes * self._window)
        return start + self._per_context * context + self._per_window * in_window

    def prefill_time(self, prefills: Sequence[PrefillChunk]) -> float:
        """Return the attention of a stage's layers over all prefill chunks."""
        time = self._num_full * self._prefill_time(*attended(prefills))
        if self._num_sliding:
            time += self._num_sliding * self._prefill_time(*attended(prefills, self._window))
        return time

    def lm_head_time(self, num_sequences: int) -> float:
        """Return the time of the LM head, for one row per decode and per prefill chunk.

        A chunk that does not end its prompt needs none; the product is bound by reading its
        weights, so that a row more costs next to nothing.
        """
        return self._kernels.product_time(num_sequences, self._vocabulary, self._hidden_size)
