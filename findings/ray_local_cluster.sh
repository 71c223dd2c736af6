#!/usr/bin/env bash
# Ray 2.60.0: three things that a cluster for one program on one machine does otherwise than it is told.
#
# Expected: ray.init(_node_ip_address="127.0.0.1") listens on the loopback interface. A folder for _temp_dir that only its owner may use
# stays so. With log_to_driver=False nothing of Ray's is on the program's stdout.
# Seen: 127.0.0.1 is replaced by the machine's address on the network, and the servers listen on every interface. The folder gets mode 0777,
# so that every user may replace what is in it. When an actor dies, a message is on stdout, in colour and also where that is no terminal.
#
# RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, named for other systems, keeps all on the loopback interface on Linux too (shown last). A folder
# inside a closed one is safe.
#
# Installs the packages in a temporary folder, starts two clusters and ends them. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d /tmp/finding.XXXX)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check ray==2.60.0
cat > "$folder/local.py" <<'PYTHON'
import os
import pathlib
import sys

import ray

temporary = pathlib.Path(sys.argv[1])
temporary.mkdir(mode=0o700)
found = ray.init(
    address="local", _node_ip_address="127.0.0.1", _temp_dir=str(temporary), num_cpus=1, include_dashboard=False, log_to_driver=False,
    object_store_memory=100_000_000,
)  # fmt: skip
port = int(found.address_info["gcs_address"].rpartition(":")[2])
lines = [line.split() for name in ("tcp", "tcp6") for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
addresses = {line[1].partition(":")[0] for line in lines if line[3] == "0A" and int(line[1].partition(":")[2], 16) == port}
everywhere = all(set(address) == {"0"} for address in addresses)


@ray.remote
class Actor:
    def end(self):
        os._exit(1)


try:
    ray.get(Actor.remote().end.remote())
except ray.exceptions.RayActorError:
    pass
ray.shutdown()
print("RESULT", "everywhere" if everywhere else "loopback", oct(temporary.stat().st_mode & 0o777))
PYTHON
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0000000000000000000000000000000000000000000000000000000000000000
run() { "$folder/venv/bin/python" "$folder/local.py" "$folder/$1" 2>/dev/null; }
run a > "$folder/out"
cat "$folder/out"
RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 run b > "$folder/out2"
tail -1 "$folder/out2"
grep -q '^RESULT everywhere 0o777$' "$folder/out"
grep -q 'raylet.*A worker died' "$folder/out"
grep -q '^RESULT loopback 0o777$' "$folder/out2"
