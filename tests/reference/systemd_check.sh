#!/usr/bin/env bash
# The unit under a real systemd: boots one by systemd-nspawn over a copy-on-write view of this machine's own root, the root then
# read-only and /var empty, and does with the node what an operator does. No network, nothing of the machine is changed.
#
#     tests/reference/systemd_check.sh target/debug/edge
#
# Needs root, systemd-container and overlayfs. Prints a line for each check; ends with the number that failed.
set -euo pipefail
program=$(realpath "$1")
unit=$(dirname "$(realpath "$0")")/../../edge/packaging/edge.service
model=$(dirname "$(realpath "$0")")/../../edge/model/demo.onnx
work=$(mktemp -d)
root=$work/layers/root
failed=0

end() {
    [ -z "${leader:-}" ] || inside systemctl poweroff >/dev/null 2>&1 || true
    wait
    mountpoint -q "$root" && umount "$root"
    mountpoint -q "$work/layers" && umount "$work/layers"
    rm -rf "$work"
}
trap end EXIT

inside() { nsenter -t "$leader" -a "$@"; }
state() { inside systemctl show edge -p "$1" --value; }
check() { # NAME, then a command that must succeed, tried for ten seconds
    local name=$1 tries
    shift
    for tries in $(seq 50); do
        if "$@" >/dev/null 2>&1; then echo "ok      $name"; return; fi
        sleep 0.2
    done
    echo "FAILED  $name"
    failed=$((failed + 1))
}
is() { [ "$(state "$1")" = "$2" ]; }
fails() { ! "$@"; }
says() { inside edge status --config /etc/pe-edge/edge.toml | grep -q "$1"; }

mkdir "$work/layers"
mount -t tmpfs tmpfs "$work/layers"
mkdir "$work/layers/upper" "$work/layers/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/layers/upper,workdir=$work/layers/work" "$root"
install -m 0755 "$program" "$root/usr/bin/edge"
chroot "$root" useradd --system --user-group --no-create-home --shell /usr/sbin/nologin pe-edge
install -d -m 0750 "$root/etc/pe-edge"
chroot "$root" chgrp pe-edge /etc/pe-edge
# The file of the configuration is the one thing that is changed below; it lies where that is possible.
ln -s /run/edge.toml "$root/etc/pe-edge/edge.toml"
install -m 0644 "$unit" "$root/etc/systemd/system/"
cp "$model" "$root/etc/pe-edge/offered.onnx"
ln -sf /dev/null "$root/etc/systemd/system/systemd-networkd-wait-online.service"
rm -f "$root"/etc/systemd/system/multi-user.target.wants/*
echo uninitialized > "$root/etc/machine-id"

systemd-nspawn -q -D "$root" --register=no --keep-unit --private-network --volatile=state \
    -b systemd.unit=multi-user.target >"$work/console" 2>&1 &
container=$!
for _ in $(seq 100); do
    leader=$(pgrep -P "$container" | head -1 || true)
    [ -n "$leader" ] && inside systemctl is-system-running 2>/dev/null | grep -q 'running\|degraded' && break
    sleep 0.3
done
inside ip link set lo up
inside sh -c 'printf "state_dir = \"/var/lib/pe-edge\"\nquiet_time_s = 2\n" > /run/edge.toml'

check "the root cannot be written" fails inside touch /usr/written
check "it starts" inside systemctl start edge
check "it is ready" says '^ready'
check "a study is sent" inside edge demo --config /etc/pe-edge/edge.toml
check "and decided" says 'studies    1, 1 suspected'
worker='cat /proc/$(pgrep -P $(systemctl show edge -p MainPID --value) | head -1)/status | grep -q "^Seccomp:.2"'
check "its worker is confined" inside sh -c "$worker"
check "it has no capability" inside sh -c 'grep -q "CapBnd:.0000000000000000" /proc/$(systemctl show edge -p MainPID --value)/status'
check "root installs a model" inside edge model install /etc/pe-edge/offered.onnx --unsigned --config /etc/pe-edge/edge.toml
check "it restarts" inside systemctl restart edge
check "with the model that is on trial" says 'self-test: passed'
check "and the study is still there" says 'studies    1, 1 suspected'
check "root cannot start it by hand in the unit's folder" fails inside edge serve --config /etc/pe-edge/edge.toml
check "a reload is taken" inside systemctl reload edge
inside sh -c 'echo "quiet_tim_s = 3" >> /run/edge.toml'
check "a faulty file fails the reload" fails inside systemctl reload edge
check "and changes nothing" is ActiveState active
inside systemctl restart edge >/dev/null 2>&1 || true
check "a start with it ends with 78" is ExecMainStatus 78
check "and is not tried again" is ActiveState failed
inside sh -c 'sed -i /quiet_tim_s/d /run/edge.toml; systemctl reset-failed edge; systemctl start edge'
inside systemctl kill -s KILL edge
check "killed, it is started again" is NRestarts 1
check "and is ready" says '^ready'
inside sh -c 'kill -STOP $(systemctl show edge -p MainPID --value)'
sleep 65
check "hung, the watchdog starts it again" is NRestarts 2
check "it stops in order" inside systemctl stop edge
check "with success" is Result success
inside systemctl poweroff >/dev/null 2>&1 || true
leader=
exit "$failed"
