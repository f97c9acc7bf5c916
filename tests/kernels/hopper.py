"""Compile a Triton launch for sm_90 without a GPU: a recorder takes the kernel's place and reports what ptxas says."""

import re
import subprocess
import tempfile
from pathlib import Path

import numpy
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = 232_448  # bytes a block may use on an H100
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def interpreter_works():
    """Triton 3.6's interpreter turns a loop's bound into an int in a way that numpy 2.4 refuses."""
    return triton.__version__ >= "3.9" or tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)


class Build:
    """Stands in for a kernel: `build[grid](...)` compiles what the launch would run and keeps its resources."""

    def __init__(self, kernel, source=ASTSource):
        self.kernel, self.source = kernel, source
        self.shared = self.registers = self.stack = 0
        self.ptx, self.cubin = "", b""

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        names = self.kernel.arg_names
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
        values = {**dict(zip(names, args, strict=False)), **options}
        assert values.keys() == set(names), values.keys() ^ set(names)
        constants = {
            (names.index(p.name),): values[p.name]
            for p in self.kernel.params
            if p.is_constexpr or (isinstance(values[p.name], int) and values[p.name] == 1)
        }
        signature, attrs = {}, {}
        for i, name in enumerate(names):
            value = values[name]
            if (i,) in constants:
                signature[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attrs[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32"
                if value % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            elif hasattr(value, "block_shape"):  # a TMA descriptor made on the host; Gluon's names a layout as well
                layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
            else:
                signature[name] = "fp32"
        source = self.source(self.kernel, signature=signature, constexprs=constants, attrs=attrs)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
        self.ptx, self.shared = built.asm["ptx"], built.metadata.shared
        self.cubin = built.asm["cubin"]
        self._measure()

    @property
    def pinned(self):
        """Whether this is the Triton whose ptxas the kernels' register budgets were made for."""
        return triton.__version__.startswith("3.6.")

    def _tool(self, name, *options):
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([str(tool), *options, file.name], capture_output=True, text=True, check=True).stdout

    def _measure(self):
        """Registers and stack of a thread; a stack is where ptxas spills."""
        said = self._tool("cuobjdump", "-res-usage")
        self.registers = max(map(int, re.findall(r"REG:(\d+)", said)))
        self.stack = max(map(int, re.findall(r"STACK:(\d+)", said)))

    def spills_in_loop(self):
        """Whether registers move to or from the stack between the first and the last matrix product."""
        steps = re.findall(r"\b([HQ]GMMA|LDL|STL)\b", self._tool("nvdisasm", "-c"))
        products = [i for i, step in enumerate(steps) if step.endswith("GMMA")]
        return products[-1] - products[0] + 1 > len(products)

    def serialized(self):
        """Matrix products of a warp group that ptxas made wait for the one before, beside the waits in the PTX."""
        waits = self._tool("nvdisasm", "-c").count("WARPGROUP.DEPBAR")
        return max(0, waits - self.ptx.count("wgmma.wait_group"))
