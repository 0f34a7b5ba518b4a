"""Layers in ExecuTorch with dense weights and with indices looked up in a table: bytes and speed.

    python benchmarks/executorch_table.py    # in an environment with fewbits[executorch]

The table is written with operators that ExecuTorch has: indices of 8 bits, widened, and
index_select. 16 values, one example, the median of 11 runs.
"""

import time
import warnings
from importlib import metadata
from statistics import median

import torch
from torch import Tensor, nn

VALUES = 16


class Layer(nn.Module):
    """A linear layer or a convolution whose weight is dense or looked up."""

    def __init__(self, shape: tuple[int, ...], *, table: bool):
        super().__init__()
        indices = torch.randint(VALUES, shape, generator=torch.Generator().manual_seed(0))
        codebook = torch.linspace(-0.1, 0.1, VALUES)
        self.shape, self.table = shape, table
        if table:
            self.register_buffer("indices", indices.reshape(-1).to(torch.uint8))
            self.register_buffer("codebook", codebook)
        else:
            self.register_buffer("weight", codebook[indices])

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if not self.table else self.looked_up()
        assert isinstance(weight, Tensor)
        if len(self.shape) == 2:
            return nn.functional.linear(x, weight)
        return nn.functional.conv2d(x, weight, padding=1)

    def looked_up(self) -> Tensor:
        assert isinstance(self.codebook, Tensor) and isinstance(self.indices, Tensor)
        places = self.indices.to(torch.int32)
        return torch.index_select(self.codebook, 0, places).view(self.shape)


def measured(layer: nn.Module, x: Tensor) -> tuple[int, float]:
    """Bytes of the program and milliseconds of a run, whose outputs are checked."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    traced = torch.export.export(layer, (x,))
    edge = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()])
    data = bytes(edge.to_executorch().buffer)
    method = Runtime.get().load_program(data).load_method("forward")
    torch.testing.assert_close(method.execute([x])[0], layer(x), rtol=1e-4, atol=1e-4)
    times = []
    for _ in range(11):
        start = time.perf_counter()
        method.execute([x])
        times.append(1000 * (time.perf_counter() - start))
    return len(data), median(times)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(f"executorch {metadata.version('executorch')}, torch {torch.__version__}\n")
    print("| layer | weight | bytes | one example, ms |\n|---|---|---:|---:|")
    cases = {
        "linear, 1024 x 1024": ((1024, 1024), (1, 1024)),
        "convolution, 128 x 128 x 3 x 3 on 16 x 16": ((128, 128, 3, 3), (1, 128, 16, 16)),
    }
    for name, (shape, size) in cases.items():
        x = torch.randn(size)
        for table in (False, True):
            count, ms = measured(Layer(shape, table=table).eval(), x)
            print(f"| {name} | {'table' if table else 'dense'} | {count:,} | {ms:.2f} |")


if __name__ == "__main__":
    main()
