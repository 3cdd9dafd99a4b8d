#!/bin/bash
# Checks Lockstep on this machine's first GPU, in less than ten minutes: see check.py, to which this gives CUDA's libraries.
#
#     tests/gpu/check.sh [FOLDER] [--emulator]        FOLDER: from pack.sh; default: target/gpu
set -eu
here=$(cd "$(dirname "$0")" && pwd)
# pip puts NVRTC, cuBLASLt and NCCL into folders of their own, where the loader does not look.
pip=$(python3 - <<'PYTHON'
import glob, sysconfig
folders = {path.rsplit("/", 1)[0] for name in ("libnvrtc.so.*", "libcublasLt.so.*", "libnccl.so.2")
           for path in glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/lib/" + name)}
print(":".join(sorted(folders)))
PYTHON
)
export LD_LIBRARY_PATH=$pip${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec python3 "$here/check.py" "$@"
