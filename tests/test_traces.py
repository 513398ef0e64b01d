"""Trace files are recognised, read to the last row, and refused with the line that is wrong."""

from __future__ import annotations

import gzip
import json
import warnings

import numpy as np
import pytest
from shared_folder import SHARED

from vidur_simpy.errors import ConfigError, TraceError
from vidur_simpy.workload import (
    Poisson,
    PublishedLengths,
    Trace,
    TraceArrivals,
    TraceLengths,
    Workload,
    read_arrivals,
    read_lengths,
    read_trace,
)

TRACES = SHARED / "data" / "traces"
needs_traces = pytest.mark.skipif(
    not TRACES.is_dir(), reason="the public traces are not beside the repository"
)

HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
VIDUR = HEADER + "0.5,100,10\n1.25,200,20\n3.0,300,30\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def rng(seed=0):
    return np.random.default_rng(seed)


# The formats


def test_vidur_csv(write):
    """Seconds are taken as they are, not moved to zero."""
    requests = read_trace(write(VIDUR))
    assert requests.arrived_at.tolist() == [0.5, 1.25, 3.0]
    assert requests.num_prefill_tokens.tolist() == [100, 200, 300]
    assert requests.num_decode_tokens.tolist() == [10, 20, 30]
    assert requests.request_id is requests.priority is requests.hash_ids is None


def test_vidur_csv_with_all_its_columns(write):
    """Identifiers, priorities, deadlines, sessions and prefix blocks come along, sorted."""
    path = write(
        "request_id,arrived_at,num_prefill_tokens,num_decode_tokens,priority,deadline,"
        "session_id,hash_ids\n"
        "7,2.0,33,1,-1,9.5,b,4 5 6\n"
        "3,1.0,16,1,0,,,8\n"
    )
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        requests = read_trace(path, hash_block_size=16)
    assert requests.request_id.tolist() == [3, 7]
    assert requests.priority.tolist() == [0, -1]
    assert np.array_equal(requests.deadline, [np.nan, 9.5], equal_nan=True)
    assert requests.session_id.tolist() == ["", "b"]
    assert [ids.tolist() for ids in requests.hash_ids] == [[8], [4, 5, 6]]
    assert requests.hash_block_size == 16


def test_azure_csv(write):
    """Dates become seconds from the first, CRLF and a missing last newline are no matter."""
    path = write(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 23:59:59.5000000,374,44\r\n"
        "2023-11-17 00:00:01.6234560,396,109"
    )
    requests = read_trace(path)
    assert requests.arrived_at.tolist() == [0.0, 2.123456]
    assert requests.num_decode_tokens.tolist() == [44, 109]


def test_azure_dates_with_a_time_zone(write):
    """As the week-long traces of 2024 write them."""
    path = write(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00+00:00,1,1\n2024-05-10 00:00:00.009930+00:00,1,1\n"
    )
    assert read_arrivals(path).tolist() == [0.0, 0.00993]


def test_mooncake_lines(write):
    """Milliseconds become seconds; blank lines are skipped."""
    path = write(
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n\n'
        '{"timestamp": 40, "input_length": 512, "output_length": 6, "hash_ids": [0]}\n',
        "mooncake.jsonl",
    )
    requests = read_trace(path)
    assert requests.arrived_at.tolist() == [0.0, 0.04]
    assert [ids.tolist() for ids in requests.hash_ids] == [[0, 1], [0]]


def test_spaces_bom_blank_lines_and_whole_floats_are_no_matter(write):
    """What spreadsheets and data frames write is read."""
    path = write("\ufeff arrived_at , num_prefill_tokens,num_decode_tokens\n\n 1 , 2.0 , 3\n\n")
    requests = read_trace(path)
    assert (requests.arrived_at[0], requests.num_prefill_tokens[0]) == (1.0, 2)


def test_a_gzipped_trace_is_unpacked(write):
    """Told by the content, whatever the name."""
    path = write(gzip.compress(VIDUR.encode()), "trace.csv.gz")
    assert len(read_trace(path)) == 3


def test_lengths_and_arrivals_can_be_read_alone(write):
    """A file needs only the columns that are used."""
    lengths = write("num_prefill_tokens,num_decode_tokens\n5,6\n", "lengths.csv")
    arrivals = write("arrived_at\n0.5\n1.0\n", "arrivals.csv")
    assert read_lengths(lengths)[1].tolist() == [6]
    assert read_arrivals(arrivals).tolist() == [0.5, 1.0]
    with pytest.raises(TraceError, match=r"TraceLengths\(path\) takes them"):
        read_trace(lengths)


def test_rows_out_of_order_are_sorted_stably_with_a_warning(write):
    """The warning says how many and where the first is; ties keep their order."""
    path = write(HEADER + "1.0,1,1\n2.0,2,1\n1.0,3,1\n0.5,4,1\n2.0,5,1\n")
    with pytest.warns(UserWarning, match=r"2 of 5 rows arrive before .* first in line 4"):
        requests = read_trace(path)
    assert requests.num_prefill_tokens.tolist() == [4, 1, 3, 2, 5]


# What is refused


@pytest.mark.parametrize(
    ("cells", "what"),
    [
        ("0,-5,1", "line 3: num_prefill_tokens = '-5', expected a whole number of tokens from 1"),
        ("0,0,1", "line 3: num_prefill_tokens = '0'"),
        ("0,1,0", "line 3: num_decode_tokens = '0'"),
        ("0,1.5,1", "line 3: num_prefill_tokens = '1.5'"),
        ("0,nan,1", "line 3: num_prefill_tokens = 'nan'"),
        ("0,inf,1", "line 3: num_prefill_tokens = 'inf'"),
        ("0,many,1", "line 3: num_prefill_tokens = 'many'"),
        ("0,99999999999999999999,1", "line 3: num_prefill_tokens = '9999"),
        ("0,1,", "line 3: num_decode_tokens is missing"),
        ("0,1", "line 3: num_decode_tokens is missing"),
        ("0,1,1,1", "line 3: '1' is one value too many, expected 3: arrived_at"),
        ("-1,1,1", "line 3: arrived_at = '-1', expected finite seconds >= 0"),
        ("nan,1,1", "line 3: arrived_at = 'nan'"),
        ("soon,1,1", "line 3: arrived_at = 'soon'"),
        (",1,1", "line 3: arrived_at is missing"),
    ],
)
def test_an_unusable_value_is_named_with_its_line(write, cells, what):
    """File, line as an editor shows it, column, value and what was expected."""
    path = write(HEADER + "0,1,1\n" + cells + "\n0,1,1\n")
    with pytest.raises(TraceError, match=what) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"input_length": 1.5}, "line 2: input_length = 1.5"),
        ({"input_length": True}, "line 2: input_length = True"),
        ({"output_length": None}, "line 2: output_length is missing"),
        ({"timestamp": -1}, "line 2: timestamp = -1, expected finite milliseconds"),
        ({"timestamp": float("nan")}, "line 2: timestamp = nan"),
        ({"hash_ids": None}, "line 2: hash_ids is missing"),
        ({"hash_ids": 3}, "line 2: hash_ids = 3"),
        ({"hash_ids": [1.5]}, r"line 2: hash_ids = \[1.5\]"),
        ({"hash_ids": [1, 2]}, "line 2: hash_ids has 2 ids, expected 1 for a prompt of 9 tokens"),
    ],
)
def test_an_unusable_json_value_is_named_with_its_line(write, changed, what):
    """Types that JSON tells apart are told apart."""
    row = {"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1]}
    path = write(json.dumps(row) + "\n" + json.dumps(row | changed) + "\n", "trace.jsonl")
    with pytest.raises(TraceError, match=what):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (HEADER, "has a header but no rows"),
        ("when,prompt\n1,2\n", r"has the columns when, prompt; .*vidur \(arrived_at.*mooncake"),
        ("0.0,374,44\n4.3,396,109\n", "has the columns 0.0, 374, 44; expected those of"),
        ("arrived_at,arrived_at\n1,2\n", "expected each once"),
        ("[1, 2]\n", r"starts with '\[1, ', expected a header and rows, or a JSON object on each"),
        ("PAR1", "starts with 'PAR1', expected a header"),
        ('{"timestamp": 0}\n{"timesta', "line 2: not a JSON object"),
        ('{"timestamp": 0}\n[1]\n', r"line 2: '\[1\]', expected a JSON object"),
        ('{"timestamp": 0}\n', "has the columns timestamp; expected those of"),
        (b"\xff\xfe\x00", "is not a text file"),
        (gzip.compress(VIDUR.encode(), mtime=0)[:30], "is not a whole gzip file"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n",
            "line 2: TIMESTAMP = 'yesterday', expected a date like",
        ),
        ("request_id," + HEADER + "4,0,1,1\n4,0,1,1\n", "line 3: request_id = 4 was given before"),
        ("request_id," + HEADER + "x,0,1,1\n", "line 2: request_id = 'x', expected a whole number"),
        ("deadline," + HEADER + "-3,0,1,1\n", "line 2: deadline = '-3'"),
        ("priority," + HEADER + "high,0,1,1\n", "line 2: priority = 'high'"),
        ("hash_ids," + HEADER + "a b,0,1,1\n", "line 2: hash_ids = 'a b', expected integers"),
        ("hash_ids," + HEADER + "1,0,513,1\n", "line 2: hash_ids has 1 ids, expected 2"),
    ],
)
def test_an_unusable_file_says_what_was_expected(write, text, what):
    """Empty, unknown, cut off or inconsistent files are refused."""
    with pytest.raises(TraceError, match=what):
        read_trace(write(text))


def test_a_missing_file_names_the_nearest(write):
    """A slip in the name is likely; so is one in the folder."""
    path = write(VIDUR, "workload.csv")
    with pytest.raises(TraceError, match=r"worklaod.csv does not exist. Did you mean 'workload.c"):
        read_trace(path.with_name("worklaod.csv"))
    with pytest.raises(TraceError, match="Nor does the folder"):
        read_trace(path.parent / "nowhere" / "workload.csv")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(path.parent)


def test_a_format_asked_for_is_insisted_on(write):
    """No other format is tried."""
    with pytest.raises(TraceError, match=r"expected those of azure \(TIMESTAMP"):
        read_trace(write(VIDUR), "azure")


# Replay


def test_a_trace_takes_the_head_that_is_asked_for(write):
    """By number, or by time after scaling."""
    path = write(VIDUR)
    assert len(Trace(path, num_requests=2).requests()) == 2
    assert len(Trace(path, duration=3.0).requests()) == 2
    assert len(Trace(path, duration=3.0, time_scale=0.5).requests()) == 3


def test_a_trace_scales_times_and_lengths(write):
    """Products are truncated, and at least one token."""
    trace = Trace(write(VIDUR), time_scale=2.0, prefill_scale=0.333, decode_scale=0.01)
    requests = trace.requests()
    assert requests.arrived_at.tolist() == [1.0, 2.5, 6.0]
    assert requests.num_prefill_tokens.tolist() == [33, 66, 99]
    assert requests.num_decode_tokens.tolist() == [1, 1, 1]


def test_a_deadline_keeps_its_distance_from_the_arrival(write):
    """Stretching arrivals does not give a request more time."""
    path = write("deadline," + HEADER + "5.0,2.0,1,1\n")
    assert Trace(path, time_scale=2.0).requests().deadline[0] == 7.0


def test_a_trace_clips_and_drops_the_ids_of_the_tokens_cut(write):
    """Hash ids always fit the prompt they belong to."""
    row = {"timestamp": 0, "input_length": 1500, "output_length": 100, "hash_ids": [1, 2, 3]}
    path = write(json.dumps(row), "trace.jsonl")
    clipped = Trace(path, clip="prompt").requests(max_model_len=1000)
    halved = Trace(path, prefill_scale=0.3).requests()
    kept = Trace(path).requests(max_model_len=1000)
    assert (clipped.num_prefill_tokens[0], clipped.hash_ids[0].tolist()) == (900, [1, 2])
    assert (halved.num_prefill_tokens[0], halved.hash_ids[0].tolist()) == (450, [1])
    assert kept.num_prefill_tokens[0] == 1500
    with pytest.raises(ConfigError, match=r"prefill_scale = 2.0: expected at most 1"):
        Trace(path, prefill_scale=2.0).requests()


def test_a_trace_with_fewer_requests_than_asked_for_says_so(write):
    """Nothing is repeated to make up the number."""
    path = write(VIDUR)
    with pytest.raises(TraceError, match="has 3 requests, num_requests = 4 asks for more"):
        Trace(path, num_requests=4).requests()
    with pytest.raises(TraceError, match=r"no request before duration = 0.5; .* arrives at 0.5"):
        Trace(path, duration=0.5).requests()
    with pytest.raises(TraceError, match="has 3 requests, num_requests = 4 asks for more"):
        TraceArrivals(path).arrival_times(rng(), num_requests=4)
    with pytest.raises(TraceError, match="has 3 rows, 4 lengths are asked for"):
        TraceLengths(path, order="file").sample(rng(), 4)


@pytest.mark.parametrize("factor", ["time_scale", "prefill_scale", "decode_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_factors_must_be_positive(factor, value):
    """Zero would stop the clock or empty the requests."""
    with pytest.raises(ConfigError, match=f"Trace.{factor} = "):
        Trace("trace.csv", **{factor: value})


def test_a_factor_may_not_make_requests_without_end(write):
    """Lengths stay within what 64 bits can multiply."""
    with pytest.raises(ConfigError, match=r"decode_scale = 1000000000.0: makes a request of"):
        Trace(write(VIDUR), decode_scale=1e9).requests()


def test_a_trace_is_cut_by_number_or_by_time():
    """Not by both."""
    with pytest.raises(ConfigError, match="expected at most one"):
        Trace("trace.csv", num_requests=1, duration=1.0)


def test_recorded_arrivals_and_lengths_can_be_mixed(write):
    """Recorded lengths at a Poisson pace, or recorded times with drawn lengths."""
    path = write(VIDUR)
    paced = Workload(Poisson(1.0), TraceLengths(path, order="file"), num_requests=3)
    drawn = Workload(
        TraceArrivals(path, time_scale=2.0), PublishedLengths("azure-conv-2023"), duration=6.0
    )
    assert paced.requests(rng(), rng()).num_prefill_tokens.tolist() == [100, 200, 300]
    assert drawn.requests(rng(), rng()).arrived_at.tolist() == [1.0, 2.5]


def test_trace_lengths_are_drawn_in_three_ways(write):
    """Rows stay whole; a shuffle uses each once, resampling as often as it likes."""
    path = write(VIDUR)
    shuffled, _ = TraceLengths(path, order="shuffle").sample(rng(), 3)
    prompt, output = TraceLengths(path, decode_scale=2.0).sample(rng(), 3000)
    assert sorted(shuffled) == [100, 200, 300]
    assert np.array_equal(prompt, output * 5)
    assert all(abs(np.mean(prompt == value) - 1 / 3) < 0.04 for value in (100, 200, 300))


# The public traces


@needs_traces
@pytest.mark.parametrize(
    ("file", "rows", "prompt", "output", "duration"),
    [
        ("azure_llm_2023_code.csv", 8_819, 2047.848, 27.883, 3435.948),
        ("azure_llm_2023_conv.csv", 19_366, 1154.697, 211.126, 3501.722),
        ("mooncake_fast25_conversation.jsonl", 12_031, 12035.061, 342.619, 3536.999),
        ("mooncake_fast25_synthetic.jsonl", 3_993, 15325.477, 149.119, 1022.025),
    ],
)
def test_a_public_trace_is_read_whole(file, rows, prompt, output, duration):
    """Rows, means and length are those computed by others; nothing is out of order."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        requests = Trace(TRACES / file).requests()
    assert len(requests) == rows
    assert requests.num_prefill_tokens.mean() == pytest.approx(prompt, abs=5e-4)
    assert requests.num_decode_tokens.mean() == pytest.approx(output, abs=5e-4)
    assert requests.arrived_at[-1] == pytest.approx(duration, abs=5e-4)


@needs_traces
@pytest.mark.parametrize("kind", ["code", "conv"])
def test_azure_dates_agree_with_the_seconds_vidur_made_of_them(kind):
    """Two people read the same file to the same requests."""
    ours = read_trace(TRACES / f"azure_llm_2023_{kind}.csv")
    theirs = read_trace(TRACES / f"vidur_splitwise_{kind}.csv")
    assert np.abs(ours.arrived_at - theirs.arrived_at).max() < 1e-9
    assert np.array_equal(ours.num_prefill_tokens, theirs.num_prefill_tokens)
    assert np.array_equal(ours.num_decode_tokens, theirs.num_decode_tokens)


@needs_traces
def test_lengths_without_arrivals_are_read():
    """The arXiv file has lengths only."""
    path = TRACES / "vidur_arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
    prompt, output = read_lengths(path)
    assert len(prompt) == 28_257
    assert (prompt.mean(), output.mean()) == pytest.approx((2588.078, 291.430), abs=5e-4)


@needs_traces
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("azure-code-2023", "azure_llm_2023_code.csv"),
        ("azure-conv-2023", "azure_llm_2023_conv.csv"),
        (
            "arxiv-summarization",
            "vidur_arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        ),
        ("mooncake-conversation", "mooncake_fast25_conversation.jsonl"),
        ("mooncake-synthetic", "mooncake_fast25_synthetic.jsonl"),
    ],
)
def test_published_quantiles_are_those_of_the_trace(name, file):
    """The table carried over was computed from the file it names."""
    figures = PublishedLengths(name).statistics
    levels = np.arange(101) / 100
    for side, values in zip(("prompt", "output"), read_lengths(TRACES / file), strict=True):
        computed = np.quantile(values, levels, method="inverted_cdf")
        assert computed.tolist() == figures[side]["quantiles_1pct"]
        assert values.std() == pytest.approx(figures[side]["std"], abs=0.1)


def test_an_slo_for_each_class_gives_deadlines(write):
    """A request is due so long after its arrival as its class allows; a given deadline stays."""
    path = write(
        "arrived_at,num_prefill_tokens,num_decode_tokens,priority,deadline\n"
        "0.0,10,2,0,\n1.0,10,2,1,\n2.0,10,2,1,2.5\n"
    )
    requests = Trace(path, slo_by_priority={0: 0.5, 1: 10.0}).requests()
    assert requests.deadline.tolist() == [0.5, 11.0, 2.5]
    with pytest.raises(TraceError, match="priority 1, slo_by_priority has 0: expected an SLO"):
        Trace(path, slo_by_priority={0: 0.5}).requests()
    with pytest.raises(ConfigError, match=r"slo_by_priority\[0\] = -1.0: expected a positive"):
        Trace(path, slo_by_priority={0: -1.0})
