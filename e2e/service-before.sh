#!/bin/bash
# What a machine has when it boots in e2e/service.sh: targets with namespaces, which play the part
# of other machines. For "life", it also has the package, and connections with their file systems
# in fstab.
set -euo pipefail

cd "$(dirname "$0")/.."
. e2e/service-lab.sh

if [ "$UN_SERVICE" = life ]; then
	targets
	install
	connection late 4430 # its target comes after the boot
	echo "/dev/disk/by-path/nvmeof-$base:late-ns-1 /mnt/late ext4 _netdev,nofail,x-systemd.device-timeout=0 0 0" >>/etc/fstab
else
	mkdir -p /var/lib/targets
	targets files=/var/lib/targets
fi
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
