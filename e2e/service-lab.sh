# Functions for e2e/service-before.sh and e2e/service.sh, which source this file.

. e2e/lab.sh

base=nqn.2026-01.org.example

# connection NAME SERVICE writes the file of a connection. Nothing here is about targets that do
# not answer in time, and an emulated machine may stand still for some seconds.
connection() {
	cat >"/etc/ublk-nvmeof/$1.conf" <<-END
		traddr = $LAB_ADDR
		trsvcid = $2
		nqn = $base:$1
		nr-io-queues = 2
		ctrl-loss-tmo = -1
		keep-alive-tmo = 30
	END
}
# backing NAME NSID prints the target's block device, or file, of a namespace.
backing() { cat "/sys/kernel/config/nvmet/subsystems/$base:$1/namespaces/$2/device_path"; }

# targets [KEY=VALUE…] makes the targets, which are somebody else's machines: e is found by
# discovery.
targets() {
	local name svc=4420
	for name in disk b c d e; do
		lab_target nqn=$base:$name svc=$svc size=64 bs=4096 ns=$([ $name = disk ] && echo 2 || echo 1) "$@"
		svc=$((svc + 1))
	done
}

# install installs the package, and configures connections with their file systems.
install() {
	local uuid wait=_netdev,x-systemd.device-timeout=5min
	rm -f /var/lib/man-db/auto-update # reading all manual pages takes minutes here
	dpkg -i build/ublk-nvmeof_*.deb
	connection disk 4420
	connection b 4421
	connection c 4422
	connection d 4423
	mkdir -p /etc/nvme
	echo "--transport=rdma --traddr=$LAB_ADDR --trsvcid=4424 --nr-io-queues=2 --ctrl-loss-tmo=-1 --keep-alive-tmo=30" >/etc/nvme/discovery.conf
	mkfs.ext4 -q -U 11111111-2222-3333-4444-555555555555 "$(backing disk 1)"
	mkfs.ext4 -q "$(backing disk 2)"
	mkfs.ext4 -q -U 66666666-7777-8888-9999-000000000000 "$(backing b 1)"
	mkfs.ext4 -q "$(backing c 1)"
	mkfs.ext4 -q -L lab-d "$(backing d 1)"
	mkfs.ext4 -q "$(backing e 1)"

	mkdir -p /mnt/{uuid,id,b,c,d,e,late}
	uuid=$(cat "/sys/kernel/config/nvmet/subsystems/$base:disk/namespaces/2/device_uuid")
	cat >/etc/fstab <<-END
		UUID=11111111-2222-3333-4444-555555555555 /mnt/uuid ext4 $wait 0 2
		/dev/disk/by-id/nvme-uuid.$uuid /mnt/id ext4 $wait,nofail 0 2
		UUID=66666666-7777-8888-9999-000000000000 /mnt/b ext4 $wait 0 0
		/dev/disk/by-path/nvmeof-$base:c-ns-1 /mnt/c ext4 $wait 0 0
		LABEL=lab-d /mnt/d ext4 $wait 0 0
		/dev/disk/by-path/nvmeof-$base:e-ns-1 /mnt/e ext4 $wait 0 0
	END
	systemctl enable ublk-nvmeof-autoconnect.service ublk-nvmeof-discovery.service remote-fs.target
}
