"""A whole run as one plain loop, as long as nobody else is on the clock.

`processes` is the specification; this is the same in the fewest steps that Python can take, for
what most runs are: a workload from its beginning, replicas of one stage under `sarathi` or `vllm`,
first come, first served, behind a router that counts requests, with execution times of this
package; under `sarathi` of several stages, too. Nothing is recorded or listened to, so that nobody
can look before the first event that somebody else has queued: the end of ``run(until)``, a timeout,
a request that was submitted. (A process that was started before the run is such an event, at
instant 0.) Up to there no event has to be queued and no request be made: the next thing to happen
is the next arrival or the first end of a batch, and a request is a row of the workload's table.

The loop can stop at any instant and leave the rest to the processes. It does at that event, at a
ctrl-C, at an execution time that is none, and in a pipeline at one of zero seconds.
"""

from vidur_simpy.plain_loop.loop import ExpectedRequests, after_plain_loop

__all__ = ["ExpectedRequests", "after_plain_loop"]
