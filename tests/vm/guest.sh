#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
#
# usage: guest.sh native|python        (inside the virtual machine, as root)
#
# The main job on the kernel's own /dev/nbd0: attach, mkfs, mount, write with
# verify, kill the secondary in the middle, go on, catch up, unmount, compare.
# Everything written lies under /run.  What test_kernel_nbd.py looks at are the
# lines "RESULT name value"; the first command that fails ends the script.

set -Eeuo pipefail

door=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PATH=$root/.venv/bin:$PATH:/usr/sbin:/sbin LC_ALL=C.UTF-8
# The checkout is read-only here.
export PYTHONDONTWRITEBYTECODE=1
work=/run/vm-test
config=$work/vm.toml
device=/dev/nbd0
point=$work/mnt

result() { printf 'RESULT %s %s\n' "$1" "$2"; }
note() { printf '=== %3d s: %s\n' "$SECONDS" "$*"; }

line=0
trap 'line=$LINENO' ERR
at_exit() {
  local code=$?
  if [ "$code" -ne 0 ]; then
    result failed "exit code $code, line $line"
    tail -n 40 "$work"/*.log "$work"/state/*.log 2>/dev/null || true
  fi
}
trap at_exit EXIT

mirror() { # a command of nbd-mirror; none may take longer than it promises
  note "nbd-mirror $*"
  timeout 150 nbd-mirror "$@"
}

status() { # name of the result: the whole status on one line
  result "$1" "$(timeout 60 nbd-mirror status --json "$config" | tr -d '\n')"
}

start_secondary() {
  rm -f "$work/secondary.sock" "$work/secondary.pid"
  nbdkit -U "$work/secondary.sock" -P "$work/secondary.pid" \
    file "$work/secondary.img"
}

# Random writes over all of a file, each block with its own checksum and place
# in it; afterwards, with --verify_only, what was written must be read.
fio_job() { # file, more options
  local file=$1
  shift
  fio --name=job --filename="$point/$file" --rw=randwrite --bs=16k \
    --ioengine=libaio --direct=1 --iodepth=8 --verify=crc32c --verify_fatal=1 \
    --verify_state_save=0 --output="$work/fio.$file.log" "$@"
}

note "an ext4 file system on the mirror, through the $door door"
mkdir -p "$work" "$point"
cd "$work"
truncate -s 64M local.img secondary.img
cat >"$config" <<END
name = "vm"
size = "adopt"
local = "$work/local.img"
state = "$work/state"
listen = "unix:$work/vm.sock"
region_size = "64KiB"
policy = "degrade"
hold = "1s"
late_write_window = "5s"

[[remote]]
name = "far"
uri = "nbd+unix:///?socket=$work/secondary.sock"
deadline = "5s"
END
start_secondary
mirror create "$config"
# Exit code 11: it goes on starting.  Three starts of Python are many seconds on
# an emulated CPU that shares its machine with others.
mirror serve "$config" --door "$door" || {
  [ $? -eq 11 ]
  until timeout 60 nbd-mirror status --json "$config" | grep -q '"pid": [0-9]'; do
    note "still starting"
  done
}
mirror attach "$config" "$device"
result block_size "$(cat /sys/block/nbd0/queue/logical_block_size)"
mirror wait "$config" --for in_sync --timeout 120s
note "mkfs and mount"
mkfs.ext4 -q "$device"
mount "$device" "$point"

note "writing; the secondary is killed in the middle of it"
written() { awk '{print $7}' /sys/block/nbd0/stat; }
before=$(written)
fio_job during --size=24M --rate=4m &
load=$!
# 1 MiB into the load, in sectors.
for _ in $(seq 600); do
  if [ $(($(written) - before)) -gt 2048 ]; then break; fi
  sleep 0.05
done
kill -9 "$(cat "$work/secondary.pid")"
result load_at_kill "$(kill -0 "$load" && echo running || echo over)"
mirror wait "$config" --for out_of_sync --timeout 60s
wait "$load"
result load_survived yes
status after_kill

note "writing without the secondary"
fio_job alone --size=8M
sync
status alone

note "the secondary is started again"
start_secondary
mirror wait "$config" --for in_sync --timeout 120s
status caught_up

note "reading back"
echo 3 >/proc/sys/vm/drop_caches
fio_job during --size=24M --verify_only
fio_job alone --size=8M --verify_only
result verified yes

umount "$point"
mirror detach "$config"
result device_size "$(cat /sys/block/nbd0/size)"
mirror stop "$config"
kill "$(cat "$work/secondary.pid")"

note "comparing"
cmp local.img secondary.img
result images equal
e2fsck -fn secondary.img
result secondary_fsck clean
if dmesg | grep -iE 'nbd0.*(timed out|I/O error)|I/O error.*nbd0|EXT4-fs error'; then
  result kernel_errors yes
else
  result kernel_errors no
fi
note "done"
result done yes
