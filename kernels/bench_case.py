"""One benchmark case and its measurement: CUDA events around one call, 256 MiB written before each.

So no input is in L2. The GPU is kept waiting until the host has queued the call: what is timed are kernels, not Python,
as in an engine that replays CUDA graphs. Reported is the median of all timed calls with quartiles and extremes.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # five times an H100's L2
WARM_UPS = 5  # calls before the first timed one; fewer where they take long
WARM_UP_SECONDS, TIMED_SECONDS, MIN_CALLS = 0.3, 1.0, 3
WAIT_CYCLES, MAX_WAIT = 2.0e9, 5e-3  # a second of waiting in clock cycles, of an H100 at most; the longest wait
# NVIDIA H100 SXM data sheet, dense products
FLOORS: dict[str, Any] = {
    "bytes_per_second": 3.35e12,
    "bf16_flops": 989e12,
    "fp8_flops": 1979e12,
    "source": "NVIDIA H100 SXM data sheet",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table.

    prepare: allocates random inputs on the GPU and gives the call to time. flops, num_bytes: what the call must do and
    move at least; fp8_flops: those of flops that run at the FP8 rate. peer_ms: of others' kernels for the same shapes,
    by name. bar_ms, goal_ms: what must and what should be reached. needs_bytes: GPU memory without which the case is
    skipped. tests: pytest's -k expression of the tests that must pass first, "" for all of its files. panel, series,
    context: where the row stands in the plot of time against context (tokens), if anywhere.
    """

    kernel: str
    shape: str
    prepare: Callable[[], Callable[[], object]]
    flops: float | None = None
    fp8_flops: float = 0.0
    num_bytes: float | None = None
    peer_ms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bar_ms: float | None = None
    goal_ms: float | None = None
    needs_bytes: float = 0.0
    tests: str = ""
    panel: str = ""
    series: str = ""
    context: int | None = None

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"

    def row(self) -> dict[str, Any]:
        """What is known before anything ran: {"name", "kernel", "shape", …}; floor_ms is on an H100."""
        row: dict[str, Any] = {"name": self.name, "kernel": self.kernel, "shape": self.shape}
        if self.peer_ms:
            row["peer_ms"] = dict(self.peer_ms)
        for field in ("bar_ms", "goal_ms", "context"):
            if getattr(self, field) is not None:
                row[field] = getattr(self, field)
        for field in ("panel", "series"):
            if getattr(self, field):
                row[field] = getattr(self, field)
        floor = floor_ms(self.flops or 0.0, self.fp8_flops, self.num_bytes or 0.0)
        return {**row, "floor_ms": floor} if floor else row


def floor_ms(flops: float, fp8_flops: float, num_bytes: float) -> float:
    """The time that an H100 needs at least: the longer of all products at full rate and one read of the bytes."""
    products: float = (flops - fp8_flops) / FLOORS["bf16_flops"] + fp8_flops / FLOORS["fp8_flops"]
    moved: float = num_bytes / FLOORS["bytes_per_second"]
    return 1e3 * max(products, moved)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Prepare, warm up and time one case; its row.

    Beside `Case.row` it has either the times ("n", "ms", quartiles, extremes, rates, "input_bytes" and "peak_bytes" of
    GPU memory before and during a call) or "skipped" (does not fit into memory) or "failure", one line each; and
    "seconds", all that the case took.
    """
    begin = time.monotonic()
    row = case.row()
    try:
        free = torch.cuda.mem_get_info()[0]
        if case.needs_bytes > free:
            row["skipped"] = f"needs {case.needs_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB of GPU memory are free"
        else:
            times, memory = _timed(case, rounds)
            row |= {"n": len(times), **summary(times, case.flops, case.num_bytes), **memory}
    except torch.OutOfMemoryError as error:
        row["skipped"] = f"out of memory: {one_line(error)}"
    except Exception as error:  # whatever a kernel raises belongs into its own row
        row["failure"] = f"{type(error).__name__}: {one_line(error)}"
    row["seconds"] = round(time.monotonic() - begin, 2)
    return row


def one_line(error: BaseException, limit: int = 300) -> str:
    return " ".join(str(error).split())[:limit]


def _timed(case: Case, rounds: int) -> tuple[list[float], dict[str, int]]:
    call = case.prepare()
    torch.cuda.synchronize()
    memory = {"input_bytes": torch.cuda.memory_allocated()}
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    memory["peak_bytes"] = torch.cuda.max_memory_allocated()
    return time_call(call, rounds), memory


def time_call(call: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each of up to `rounds` calls with a cold L2; fewer, at least 3, where all would take over 1 s."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    begin = time.monotonic()
    warm = 0
    while warm == 0 or (warm < WARM_UPS and time.monotonic() - begin < WARM_UP_SECONDS):
        call()
        torch.cuda.synchronize()
        warm += 1
    each = (time.monotonic() - begin) / warm
    begin = time.monotonic()
    call()
    wait = int(WAIT_CYCLES * min(MAX_WAIT, 2 * (time.monotonic() - begin) + 5e-5))
    count = min(rounds, max(MIN_CALLS, int(TIMED_SECONDS / each)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, last in events:
        torch.cuda._sleep(wait)
        flush.zero_()
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in events]


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of one call after three warm-up calls; returns its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    # the graph knows addresses only: without this the inputs' memory would go to whoever asks next
    replay.inputs = call  # type: ignore[attr-defined]

    return replay


def summary(times: list[float], flops: float | None, num_bytes: float | None) -> dict[str, float]:
    """Median, quartiles and extremes of times in ms, and the rates of the median."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    row = {"ms": median, "ms_q25": low, "ms_q75": high, "ms_min": min(times), "ms_max": max(times)}
    if flops is not None:
        row["tflops"] = flops / median / 1e9
    if num_bytes is not None:
        row["gbytes_per_second"] = num_bytes / median / 1e6
    return row
