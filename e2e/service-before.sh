#!/bin/bash
# What a machine has when it boots in e2e/service.sh: two targets, the first with file
# systems on its namespaces, the package, a connection and its file systems in fstab.
set -euo pipefail

cd "$(dirname "$0")/.."
. e2e/lab.sh
lab_target ns=2 size=128 bs=4096

uuid=$(cat /sys/kernel/config/nvmet/subsystems/$LAB_NQN/namespaces/2/device_uuid)
mkfs.ext4 -q -U 11111111-2222-3333-4444-555555555555 -L lab-disk "$(cat /sys/kernel/config/nvmet/subsystems/$LAB_NQN/namespaces/1/device_path)"
mkfs.ext4 -q "$(cat /sys/kernel/config/nvmet/subsystems/$LAB_NQN/namespaces/2/device_path)"

rm -f /var/lib/man-db/auto-update # reading all manual pages takes minutes here
dpkg -i build/newer/old.deb
cat >/etc/ublk-nvmeof/disk.conf <<END
traddr = $LAB_ADDR
nqn = $LAB_NQN
nr-io-queues = 2
ctrl-loss-tmo = -1
END
mkdir -p /mnt/uuid /mnt/id
cat >/etc/fstab <<END
UUID=11111111-2222-3333-4444-555555555555 /mnt/uuid ext4 _netdev,x-systemd.device-timeout=10min,x-systemd.requires=ublk-nvmeof@disk.service 0 2
/dev/disk/by-id/nvme-uuid.$uuid /mnt/id ext4 _netdev,nofail,x-systemd.device-timeout=10min 0 2
END
# A target that comes later.
cat >/etc/ublk-nvmeof/late.conf <<END
traddr = $LAB_ADDR
nqn = nqn.2026-01.org.example:late
nr-io-queues = 1
END
systemctl enable ublk-nvmeof.target ublk-nvmeof@disk.service ublk-nvmeof@late.service remote-fs.target
systemctl set-default multi-user.target
# The journal goes to the console, too, so that the shutdown can be looked at.
mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nForwardToConsole=yes\nMaxLevelConsole=info\n' >/etc/systemd/journald.conf.d/console.conf
