"""Compiles the contract when the package is built, or installed to be edited."""

from pathlib import Path
from typing import Any

import grpc_tools
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ContractHook(BuildHookInterface):
    """Writes `lockstep/v1/*_pb2*` beside the code that is written by hand."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Hatchling calls it before it gathers files."""
        root = Path(self.root)
        # The repository has the contract at its root, an sdist has a copy.
        protos = next(path for path in (root / "proto", root / "../../proto") if (path / "lockstep/v1").is_dir())
        files = sorted(str(path) for path in (protos / "lockstep/v1").glob("*.proto"))
        out = root / "src"
        wellknown = Path(grpc_tools.__file__).parent / "_proto"
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{protos}", f"-I{wellknown}", *outputs, *files]) != 0:
            raise RuntimeError("the contract does not compile")
