"""The process that touches the GPU: measures cases by name and prints a line of JSON for each as it ends.

`python -m kernels.bench_worker MODULE ROUNDS`, names as a JSON list on standard input; MODULE has `all_cases()`.
It stops (exit code 3) once the GPU no longer answers it: a kernel's bad address takes the whole process along, and
`bench_supervisor` starts another one for the rest.
"""

import importlib
import json
import sys

MARK = "bench: "  # lines without it are somebody else's
LOST = 3


def main() -> int:
    import torch

    from kernels.bench_case import measure

    module, rounds = sys.argv[1], int(sys.argv[2])
    cases = {case.name: case for case in importlib.import_module(module).all_cases()}
    _tell(
        {
            "device": torch.cuda.get_device_name(),
            "device_bytes": torch.cuda.get_device_properties(0).total_memory,
            "cuda": torch.version.cuda,
        }
    )
    for name in json.load(sys.stdin):
        row = measure(cases[name], rounds)
        _tell(row)
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return LOST
    return 0


def _tell(line: dict[str, object]) -> None:
    print(MARK + json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
