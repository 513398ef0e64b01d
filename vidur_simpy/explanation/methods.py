"""The methods of a result that say why it is as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from vidur_simpy.explanation.bottleneck import Bottleneck, bottleneck_of
from vidur_simpy.explanation.groups import breakdown_of
from vidur_simpy.explanation.request import Explanation, explain_request
from vidur_simpy.explanation.saturation import Saturation, saturation_of
from vidur_simpy.plots.breakdown_bars import QUANTILES

if TYPE_CHECKING:
    import pandas as pd

    from vidur_simpy.result import Result

__all__ = ["Explanations"]


class Explanations:
    """The methods of a `Result` that say where time goes and what limits the run."""

    def explain(self, request_id: int) -> Explanation:
        """Explain where the time of one request went.

        With ``record=("phases",)`` its end-to-end latency is split into queue, prefill, decode,
        the stalls by prompts of others, the waits between steps and what preemptions cost;
        without, into the times to its first batch, to its first token and to its last.

        Parameters
        ----------
        request_id : int

        Returns
        -------
        Explanation
            Its ``text``, ``table`` and ``plot()``; a notebook shows it.

        Raises
        ------
        ConfigError
            If there is no such request; the message names the nearest.
        """
        return explain_request(cast("Result", self), request_id)

    def breakdown(
        self, metric: str = "e2e", quantiles: Sequence[float] = QUANTILES
    ) -> pd.DataFrame:
        """Return what the latency of fast and of slow requests is made of.

        Completed requests are sorted by the metric and cut into groups.

        Parameters
        ----------
        metric : str
            ``"e2e"``, ``"ttft"`` or ``"tpot"``.
        quantiles : sequence of float
            Where one group ends and the next begins, between 0 and 1.

        Returns
        -------
        DataFrame
            A row per group that has requests, the fastest first: ``num_requests``, the mean of the
            metric, and the means of its parts, which add up to it, in seconds. For ``e2e`` the
            parts are the columns of ``phases``; what preemptions cost before the first token
            (``ttft``) or behind it (``tpot``) is ``restart_time``. Without
            ``record=("phases",)`` the parts are coarse.

        Raises
        ------
        ConfigError
            If there is no such metric, or a quantile is out of range or out of order.
        """
        return breakdown_of(cast("Result", self), metric, quantiles)

    def bottleneck(self) -> Bottleneck:
        """Return what limits the run, with the numbers behind the verdict.

        The time of all requests is divided into execution and what is lost: waits in the queue and
        waits between steps. Each loss has one cause, and the cause of most of it is the verdict,
        if a tenth of the time or more is lost at all. Of refused requests, who have no time, the
        text tells first; they are the verdict if they are a tenth or more.

        A wait in the queue is blamed on what stands in the way when a batch has been formed: on
        the router, if another replica has room meanwhile; else on the batch limit, if it is
        reached; else on KV-cache memory, if the prompt of one who waits does not fit; else on
        compute. A wait between steps is blamed on memory if the request was preempted, else on the
        pipeline if there is one, else on compute. With several stages, waiting for compute counts
        for pipeline bubbles by the share of their time that stages idle although there is work.

        Returns
        -------
        Bottleneck
            Its ``verdict``, ``text`` and ``table``; a notebook shows it. It needs no recording.

        Notes
        -----
        A router that looks worse than it is: many replicas with short queues, of which some other
        is always free. ``lightllm`` holds requests back for memory that it will need later, which
        counts as compute as long as the memory is free.
        """
        return bottleneck_of(cast("Result", self))

    def saturation(self) -> Saturation:
        """Return whether the queue grows without bound; the summary says so if it does.

        The time between the first and the last arrival is cut into twenty equal spans. The run is
        saturated if the growth of the queue (requests that arrived and were in no batch yet) is
        positive on average at the level of 1 %, one-sided, by Student's t, ten requests or more
        wait at the end, and a tenth of them or more came to wait in the second half. Fewer than
        100 requests, or arrivals for less than five times as long as a request is served once it
        left the queue, are too short to tell.

        Returns
        -------
        Saturation
            Its ``is_saturated``, ``text`` and the rates; a notebook shows it.

        Notes
        -----
        A queue that grows in less than the last fifth of the run, or that has drained again, does
        not count, so neither a burst nor a busy spell does. Below capacity (loads of 0.5 to 0.95;
        200, 1,000 and 5,000 requests; Poisson and bursty arrivals, and a tenth of the requests at
        once) 1 of 1,920 runs was called saturated. Above it, with Poisson arrivals: 57 and 100 %
        at a load of 1.1 with 1,000 and 5,000 requests, all at 1.2, and with 200 requests 88 % at
        1.5; with arrivals of cv 2, 50 and 100 % at 1.2. What is not found is near capacity, or
        short (``python tests/benchmarks/saturation_errors.py --seeds 40``).
        """
        return saturation_of(cast("Result", self))
