"""Are two LaTeX answers equal? math-verify decides, in a process of its own that model text cannot hang or bloat.

math-verify's own time limit is SIGALRM, which works in the main thread only, and no limit inside the process can stop
`9^{9^{9}}`: one big-integer power holds the interpreter. The limit here is CPU seconds of the child, so that a busy
machine gives the same verdicts as an idle one. Texts go through math-verify's LaTeX grammar only; its plain-expression
reader, which ends in Python's eval, is not used.
"""

import atexit
import functools
import json
import logging
import subprocess
import sys
import threading

MAX_CPU_SECONDS = 5
MAX_MEMORY_BYTES = 4 << 30
_READY = "ready"

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=4096)
def equivalent(gold: str, answer: str) -> bool:
    """True if `answer` has the value of `gold`; both LaTeX without dollar signs.

    Numbers are equal within 1e-10, lists without regard to order. False when math-verify cannot read one of them, or
    needs more than MAX_CPU_SECONDS or MAX_MEMORY_BYTES.
    """
    return _worker().ask(gold, answer)


class Worker:
    """A child that answers one question at a time; started at the first one, and again after each one it died of."""

    def __init__(self, max_cpu_seconds: int = MAX_CPU_SECONDS) -> None:
        self._max_cpu_seconds = max_cpu_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, answer: str) -> bool:
        with self._lock:
            process = self._started()
            assert process.stdin and process.stdout, "the child is started with pipes"
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if not reply:
                self._stop()
                logger.warning("math-verify gave up on %.80r against %.80r: counted as different", answer, gold)
                return False
            return bool(json.loads(reply))

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(self._max_cpu_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            assert self._process.stdout, "the child is started with pipes"
            if self._process.stdout.readline().strip() != _READY:
                self._stop()
                raise RuntimeError("math-verify did not start; is it installed? try: pip install 'math-verify>=0.8'")
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@functools.cache
def _worker() -> Worker:
    worker = Worker()
    atexit.register(worker.close)
    return worker


def _serve(max_cpu_seconds: int) -> None:
    """The child: one JSON list [gold, answer] a line in, true or false a line out."""
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    only_latex = [LatexExtractionConfig()]

    def read(text: str) -> list[object]:
        parsed: list[object] = parse(f"${text}$", only_latex, fallback_mode="no_fallback", parsing_timeout=None)
        return parsed

    print(_READY, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(usage.ru_utime + usage.ru_stime) + 1 + max_cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            same = verify(read(gold), read(answer), float_rounding=10, timeout_seconds=None)
        except (MemoryError, RecursionError):
            same = False
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
