# SPDX-License-Identifier: Apache-2.0
"""Compile the trimmed protos into the modules beside them (needs grpcio-tools, a test dependency)."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def compile_protos(out: Path) -> int:
    """Write `chassis/wire/*_pb2.py` and their type stubs below *out*; return protoc's exit status."""
    import grpc_tools  # noqa: PLC0415 - development only
    from google.rpc import status_pb2  # noqa: PLC0415 - development only
    from grpc_tools import protoc  # noqa: PLC0415 - development only

    common_protos = Path(status_pb2.__file__).parents[2]
    sources = sorted(str(p.relative_to(_ROOT)) for p in (_ROOT / "chassis/wire").glob("*.proto"))
    status: int = protoc.main(
        [
            "protoc",
            f"-I{_ROOT}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            f"-I{common_protos}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            *(str(_ROOT / source) for source in sources),
        ]
    )
    return status


if __name__ == "__main__":
    sys.exit(compile_protos(_ROOT))
