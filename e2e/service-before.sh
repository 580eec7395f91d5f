#!/bin/bash
# What a machine has when it boots in e2e/service.sh: targets with file systems on their
# namespaces, the package, and connections with their file systems in fstab.
set -euo pipefail

cd "$(dirname "$0")/.."
. e2e/service-lab.sh

# target NAME SERVICE [KEY=VALUE…] makes a target, and a connection to it.
target() {
	lab_target nqn=$base:"$1" svc="$2" size=64 bs=4096 "${@:3}"
	connection "$1" "$2"
}
# backing NAME NSID prints the target's block device of a namespace.
backing() { cat "/sys/kernel/config/nvmet/subsystems/$base:$1/namespaces/$2/device_path"; }

rm -f /var/lib/man-db/auto-update # reading all manual pages takes minutes here
dpkg -i build/ublk-nvmeof_*.deb

target disk 4420 ns=2
target b 4421
target c 4422
target d 4423
mkfs.ext4 -q -U 11111111-2222-3333-4444-555555555555 "$(backing disk 1)"
mkfs.ext4 -q "$(backing disk 2)"
mkfs.ext4 -q -U 66666666-7777-8888-9999-000000000000 "$(backing b 1)"
mkfs.ext4 -q "$(backing c 1)"
mkfs.ext4 -q -L lab-d "$(backing d 1)"

mkdir -p /mnt/{uuid,id,b,c,d,late}
uuid=$(cat "/sys/kernel/config/nvmet/subsystems/$base:disk/namespaces/2/device_uuid")
cat >/etc/fstab <<END
UUID=11111111-2222-3333-4444-555555555555 /mnt/uuid ext4 _netdev 0 2
/dev/disk/by-id/nvme-uuid.$uuid /mnt/id ext4 _netdev,nofail 0 2
UUID=66666666-7777-8888-9999-000000000000 /mnt/b ext4 _netdev 0 0
/dev/disk/by-path/nvmeof-$base:c-ns-1 /mnt/c ext4 _netdev,x-systemd.device-timeout=3min 0 0
LABEL=lab-d /mnt/d ext4 _netdev 0 0
END
if [ "$UN_SERVICE" = life ]; then
	connection late 4424 # its target comes after the boot
	echo "/dev/disk/by-path/nvmeof-$base:late-ns-1 /mnt/late ext4 _netdev,nofail,x-systemd.device-timeout=0 0 0" >>/etc/fstab
fi
systemctl enable ublk-nvmeof-autoconnect.service remote-fs.target
systemctl set-default multi-user.target
# What takes long here and is about other things.
systemctl mask --quiet systemd-binfmt.service proc-sys-fs-binfmt_misc.automount rdma-load-modules@{rdma,roce}.service rdma-ndd.service

# The journal goes to the console, too, so that the shutdown can be looked at.
mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nForwardToConsole=yes\nMaxLevelConsole=info\n' >/etc/systemd/journald.conf.d/console.conf
# systemd runs this when everything is unmounted: what the targets have then.
cat >/usr/lib/systemd/system-shutdown/lab <<END
#!/bin/sh
exec >/dev/console 2>&1
echo "=== \$(cut -d' ' -f1 /proc/uptime) unmounted"
for disk in $(backing disk 1) $(backing disk 2) $(backing b 1) $(backing c 1); do
	e2fsck -fn \$disk >/dev/null 2>&1
	echo "=== fsck of \$disk: \$?"
done
END
chmod +x /usr/lib/systemd/system-shutdown/lab
