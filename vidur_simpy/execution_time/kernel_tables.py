"""Tables of how long iterations take, asked of NVIDIA's measured kernels once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vidur_simpy.execution_time.cache import Arrays
    from vidur_simpy.execution_time.kernel_database import Engine

__all__ = ["GRIDS", "Grid", "tabulated"]

LM_HEAD, SEND = "lm_head", "send"

OPERATORS = {
    "qkv_gemm": "attention_projections",
    "proj_gemm": "attention_projections",
    "downscale_gemm": "attention_projections",
    "q_b_proj_gemm": "attention_projections",
    "kv_b_proj_gemm": "attention_projections",
    "add_norm_1": "norms",
    "add_norm_2": "norms",
    "gate_ffn1_gemm": "mlp",
    "act_gate": "mlp",
    "ffn2_gemm": "mlp",
    "shared_gate_up_gemm": "mlp",
    "shared_act_gate": "mlp",
    "shared_ffn2_gemm": "mlp",
    "ar_1": "all_reduce",
    "ar_2": "all_reduce",
    "embedding_ar": "all_reduce",
    "tp_allreduce": "all_reduce",
    "router_gemm": "router",
    "moe": "experts",
    "moe_overlap": "experts",
    "moe_pre_dispatch": "all_to_all",
    "moe_post_dispatch": "all_to_all",
    "logits_gemm": LM_HEAD,
    "p2p": SEND,
}
"""The package's operator -> ours; others keep their name. ``moe_overlap`` are all experts."""


class Grid(NamedTuple):
    """Where iterations are asked for; between these points they are interpolated linearly.

    Attributes
    ----------
    dense_decodes, dense_tokens : int
        Up to this, every number of decodes, or of tokens, is a point.
    per_octave : int
        Beyond it, points for each doubling; of contexts and chunk lengths everywhere.
    """

    dense_decodes: int
    dense_tokens: int
    per_octave: int


GRIDS = {"fine": Grid(256, 4096, 4), "coarse": Grid(4, 4, 1)}


def tabulated(engine: Engine, grid: Grid, max_num_seqs: int, max_context: int) -> Arrays:
    """Return the times of iterations, in seconds of all stages together.

    Returns
    -------
    dict
        ``operators`` (o,), ``num_tokens`` (t,), ``token_times`` (o, t): all but attention, LM
        head and sending in iterations with prefill chunks, and ``send_times`` (t,).
        ``num_decodes`` (n,), ``decode_token_times`` (o, n): the same of decodes alone, and
        ``lm_head_times`` (n,). ``contexts`` (c,), ``decode_times`` (n, c): attention of so many
        decodes of that mean context. ``num_chunks`` (k,), ``chunks`` (l,), ``prefixes`` (p,),
        ``prefill_times`` (k, l, p): attention of so many chunks of that length after that prefix.
    """
    asked = Asked(engine)
    num_tokens = _points(max(max_context, max_num_seqs), grid.dense_tokens, 8 * grid.per_octave)
    num_decodes = _points(max_num_seqs, grid.dense_decodes, 8 * grid.per_octave)
    # A value at the end of a table is still between two points.
    contexts = _points(2 * max_context, 1, grid.per_octave)
    prefixes = np.append(0, _points(2 * max_context, 1, (grid.per_octave + 1) // 2))
    num_chunks = _points(2 * max_num_seqs, 1, 1)
    prefills = [asked.prefill(1, n, 0) for n in num_tokens.tolist()]
    decodes = [asked.decode(n, 128) for n in num_decodes.tolist()]
    apart = {*ATTENTION, LM_HEAD, SEND}
    operators = [name for name in dict.fromkeys([*prefills[-1], *decodes[-1]]) if name not in apart]
    return {
        "operators": np.asarray(operators),
        "num_tokens": num_tokens,
        "token_times": _rows(prefills, operators),
        "send_times": _rows(prefills, [SEND])[0],
        "num_decodes": num_decodes,
        "decode_token_times": _rows(decodes, operators),
        "lm_head_times": _rows(decodes, [LM_HEAD])[0],
        "contexts": contexts,
        "decode_times": np.array(
            [
                [asked.decode(n, c)[DECODE_ATTENTION] for c in contexts.tolist()]
                for n in num_decodes.tolist()
            ]
        ),
        "num_chunks": num_chunks,
        "chunks": contexts,
        "prefixes": prefixes,
        "prefill_times": np.array(
            [
                [
                    [asked.prefill(k, c, p)[PREFILL_ATTENTION] for p in prefixes.tolist()]
                    for c in contexts.tolist()
                ]
                for k in num_chunks.tolist()
            ]
        ),
    }


PREFILL_ATTENTION, DECODE_ATTENTION = "prefill_attention", "decode_attention"
ATTENTION = (PREFILL_ATTENTION, DECODE_ATTENTION)


class Asked:
    """Iterations of equal sequences, in seconds by operator."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def prefill(self, num_chunks: int, num_tokens: int, prefix: int) -> dict[str, float]:
        """Return those of chunks of so many tokens, after a prefix each."""
        operators, _ = self._engine.run_static_per_op(
            batch_size=num_chunks, isl=prefix + num_tokens, osl=2, prefix=prefix, mode="static_ctx"
        )
        return _by_name(operators, "context_", PREFILL_ATTENTION)

    def decode(self, num_decodes: int, context: int) -> dict[str, float]:
        """Return those of decodes with so much context each once they are done."""
        _, operators = self._engine.run_static_per_op(
            batch_size=num_decodes, isl=max(context - 1, 1), osl=2, mode="static_gen"
        )
        return _by_name(operators, "generation_", DECODE_ATTENTION)


def _by_name(operators: Iterable[tuple[Any, ...]], prefix: str, attention: str) -> dict[str, float]:
    times: dict[str, float] = {}
    for full_name, milliseconds, *_ in operators:
        name = full_name.removeprefix(prefix)
        # Latent attention comes with its projections.
        name = attention if name in ("attention", "mla_block") else OPERATORS.get(name, name)
        times[name] = times.get(name, 0.0) + milliseconds * 1e-3
    return times


def _rows(iterations: Sequence[dict[str, float]], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[times.get(name, 0.0) for times in iterations] for name in names])


def _points(largest: int, dense_to: int, per_octave: int) -> NDArray[np.int64]:
    """Return whole numbers from 1 to `largest`: all up to `dense_to`, then so many per doubling.

    >>> _points(20, 4, 2).tolist()
    [1, 2, 3, 4, 6, 8, 11, 16, 20]
    """
    num_steps = largest.bit_length() * per_octave
    spaced = np.round(2 ** (np.arange(num_steps + 1) / per_octave)).astype(np.int64)
    spaced = spaced[(spaced > dense_to) & (spaced < largest)]
    return np.unique(np.concatenate([np.arange(1, min(dense_to, largest) + 1), spaced, [largest]]))
