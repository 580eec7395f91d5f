#!/bin/bash
# A laboratory inside the VM: a software RDMA device and a real NVMe-oF target,
# the kernel's nvmet-rdma over rdma_rxe, with namespaces in memory (null_blk).
#
#	. e2e/lab.sh; lab_target ns=2 bs=4096      as a library for bash
#	e2e/lab.sh target ns=2 bs=4096             as a command; the scenarios
#	                                           call it by the name "lab"
#
#	rxe [MTU]             rxe0 over eth0, the interface's MTU in bytes (default: as it is)
#	target [KEY=VALUE]…   a subsystem, its namespaces and its port; see lab_target
#	list NQN 0|1          the first port serves one more subsystem, or no longer
#	referral ADDR PORT [TRANSPORT]
#	                      the first port refers hosts to the discovery service there (rdma)
#	auth HOSTNQN [KEY=VALUE]…
#	                      what the host must prove from now on: key=FILE and ctrl=FILE have
#	                      its key and that of the controller, hash=sha256 group=null
#	grant N [NQN]         at most N I/O queues from now on; makes every host reconnect
#	readonly NSID [NQN]   write protect a namespace
#	file NSID MiB         one more namespace, on a file, which can be resized
#	resize NSID MiB       resize it
#	enable NSID 0|1       take a namespace away, and give it back
#	format NSID BYTES     format it, with blocks of another size
#	ana PORT GROUP STATE  state of an ANA group over a port, which has a number from 1 on
#	group NSID GROUP      move a namespace to another ANA group
#	count                 count from zero what arrives at the target
#	counts                print the commands as lines "qid opcode number", opcode in hex
#	controllers           print the commands on I/O queues as lines "cntlid opcode number"
#	bios                  print the block requests that they became, as lines "kind number":
#	                      R read, W write, D discard, FF flush; after the kind: F = FUA, S = sync
#	wire                  two more RDMA devices with a cable between them; a target at
#	                      10.0.3.2 is reached from 10.0.3.1 through it
#	cut                   from now on nothing gets through that cable, and nobody is told
#	mend                  no more
#	down WHAT             an outage of the target at the end of the cable, and its end: the
#	up WHAT               port (nobody listens), the subsystem (others are still there),
#	                      the host's RDMA device, its network interface, or the packets to
#	                      it, from it or both ways (UDP port 4791); "port N" is another port
#	restart SECONDS       the target goes away and comes back with its port first: for so long
#	                      it has no namespace
#	far ADDR [MTU]        an RDMA device on eth1, the cable to another VM, with an address
#	outside [MTU]         a network namespace "outside" without any RDMA device, with a
#	                      cable to one outside of it: 10.0.4.1 and fd00:4::1 are in it,
#	                      10.0.4.2 and fd00:4::2 here; called again, it changes the MTU
#	bad [NETEM …]         what tc-netem is to do, in both directions, to packets between
#	                      here and "outside"; nothing more, without arguments
#	deaf                  from now on two of three acknowledgements that come from "outside" are
#	                      lost; "mend" ends it
#	initiator [P=V]…      load the kernel's initiator anew, with these parameters of its module
#	target-down [NQN]     remove the subsystem, its port and its namespaces
#	clean                 kernel initiators disconnected, targets and the cable removed
#
# State is only in the kernel, so that commands of one shell see those of another.

LAB_NQN=nqn.2026-01.org.example:lab
LAB_ADDR=10.0.2.15
LAB_PORT=4420

lab_nvmet=/sys/kernel/config/nvmet
lab_nullb=/sys/kernel/config/nullb
lab_trace=/sys/kernel/tracing/events

lab_fail() {
	echo "lab: $*" >&2
	return 1
}

# lab_set FILE VALUE writes an attribute and names it if the kernel refuses.
lab_set() {
	{ printf '%s\n' "$2" >"$1"; } 2>/dev/null || lab_fail "$1: kernel refuses '$2'"
}

lab_rxe() {
	if [ -n "${1:-}" ]; then
		ip link set eth0 mtu "$1" || return
	fi
	modprobe -a rdma_rxe rdma_ucm || return
	[ -e /sys/class/infiniband/rxe0 ] || rdma link add rxe0 type rxe netdev eth0 || return
	grep -qs ACTIVE /sys/class/infiniband/rxe0/ports/1/state || lab_fail "rxe0 is not active"
}

# lab_target KEY=VALUE…
#
#	nqn=NQN         name of the subsystem
#	addr=ADDR,…     ports' addresses, svc=PORT,… their services: a port for each pair
#	ns=N            number of namespaces (1)
#	size=N          of each, in MiB (256)
#	bs=N            logical block size in bytes, 512 or 4096 (512)
#	cache=N         volatile write cache of N MiB (0 = none)
#	delay=N         time that each request takes, in milliseconds (0)
#	discard=0|1     (1)
#	hosts=LIST      comma-separated host NQNs that may connect (any)
#	qid_max=N       at most N I/O queues per host
#	inline=N        in-capsule data in bytes
#	queue_size=N    entries of a queue
#	mdts=N          largest transfer, 4 KiB << N
#	files=DIR       namespaces on files in DIR, which are made if they do not exist, and with
#	                the same UUIDs and serial number each time
lab_target() {
	local nqn=$LAB_NQN addr=$LAB_ADDR svc=$LAB_PORT ns=1 size=256 bs=512 cache=0 delay=0 discard=1
	local hosts=any qid_max='' inline='' queue_size='' mdts='' files='' arg
	for arg in "$@"; do
		case $arg in
		nqn=* | addr=* | svc=* | ns=* | size=* | bs=* | cache=* | delay=* | discard=* | hosts=* | \
			qid_max=* | inline=* | queue_size=* | mdts=* | files=*) local "${arg?}" ;;
		*) lab_fail "target: unknown argument '$arg'" || return ;;
		esac
	done
	lab_rxe || return
	modprobe -a nvmet-rdma || return
	# Not "modprobe null_blk" alone: that makes a device of its own.
	[ -d $lab_nullb ] || modprobe null_blk nr_devices=0 || return

	local subsys=$lab_nvmet/subsystems/$nqn i host
	mkdir "$subsys" || return
	if [ "$hosts" = any ]; then
		lab_set "$subsys/attr_allow_any_host" 1 || return
	else
		for host in ${hosts//,/ }; do
			[ -d "$lab_nvmet/hosts/$host" ] || mkdir "$lab_nvmet/hosts/$host" || return
			ln -s "$lab_nvmet/hosts/$host" "$subsys/allowed_hosts/$host" || return
		done
	fi
	[ -z "$qid_max" ] || lab_set "$subsys/attr_qid_max" "$qid_max" || return
	for ((i = 1; i <= ns; i++)); do
		if [ -n "$files" ]; then
			lab_kept "$subsys" $i "$size" "$files/${nqn##*:}-$i.img" || return
		else
			lab_namespace "$subsys" $i "$size" "$bs" "$cache" "$discard" "$delay" || return
		fi
	done

	for addr in ${addr//,/ }; do
		for i in ${svc//,/ }; do
			lab_port "$addr" "$i" || return
		done
	done
}

# lab_port ADDR PORT is a part of lab_target, whose variables it uses.
lab_port() {
	local port=1 family=ipv4
	[[ $1 != *:* ]] || family=ipv6
	while [ -d "$lab_nvmet/ports/$port" ]; do port=$((port + 1)); done
	port=$lab_nvmet/ports/$port
	mkdir "$port" || return
	lab_set "$port/addr_trtype" rdma || return
	lab_set "$port/addr_adrfam" $family || return
	lab_set "$port/addr_traddr" "$1" || return
	lab_set "$port/addr_trsvcid" "$2" || return
	[ -z "$inline" ] || lab_set "$port/param_inline_data_size" "$inline" || return
	[ -z "$queue_size" ] || lab_set "$port/param_max_queue_size" "$queue_size" || return
	[ -z "$mdts" ] || lab_set "$port/param_mdts" "$mdts" || return
	ln -s "$subsys" "$port/subsystems/$nqn"
}

lab_list() {
	local link=$lab_nvmet/ports/1/subsystems/$1
	if [ "$2" = 1 ]; then ln -s "$lab_nvmet/subsystems/$1" "$link"; else rm "$link"; fi
}

lab_referral() {
	local dir=$lab_nvmet/ports/1/referrals/$1
	mkdir "$dir" || return
	lab_set "$dir/addr_trtype" "${3:-rdma}" || return
	lab_set "$dir/addr_adrfam" ipv4 || return
	lab_set "$dir/addr_traddr" "$1" || return
	lab_set "$dir/addr_trsvcid" "$2" || return
	lab_set "$dir/enable" 1
}

lab_auth() {
	local dir=$lab_nvmet/hosts/$1 arg tests=/sys/module/cryptomgr/parameters/notests
	shift
	# The kernel tests a group before its first use, which takes minutes on an emulated CPU.
	[ ! -e $tests ] || lab_set $tests Y || return
	for arg in "$@"; do
		case $arg in
		key=*) lab_set "$dir/dhchap_key" "$(cat "${arg#*=}")" || return ;;
		ctrl=*) lab_set "$dir/dhchap_ctrl_key" "$(cat "${arg#*=}")" || return ;;
		hash=*) lab_set "$dir/dhchap_hash" "hmac(${arg#*=})" || return ;;
		group=*) lab_set "$dir/dhchap_dhgroup" "${arg#*=}" || return ;;
		*) lab_fail "auth: unknown argument '$arg'" || return ;;
		esac
	done
}

# lab_kept SUBSYSTEM NSID SIZE FILE. The target cannot use a file on overlayfs, which has no
# block size, itself.
lab_kept() {
	local id loop
	[ -e "$4" ] || truncate -s "$3M" "$4" || return
	modprobe loop || return
	loop=$(losetup --find --show --sector-size 4096 "$4") || return
	id=$(printf '%s' "$4" | md5sum | cut -c -32) || return
	lab_set "$1/attr_serial" "${id:0:20}" || return
	mkdir "$1/namespaces/$2" || return
	lab_set "$1/namespaces/$2/device_path" "$loop" || return
	lab_set "$1/namespaces/$2/device_uuid" "${id:0:8}-${id:8:4}-4${id:13:3}-8${id:17:3}-${id:20:12}" || return
	lab_set "$1/namespaces/$2/enable" 1
}

# lab_namespace SUBSYSTEM NSID SIZE BLOCKSIZE CACHE DISCARD DELAY
lab_namespace() {
	local i=0 dir
	while [ -d "$lab_nullb/nullb$i" ]; do i=$((i + 1)); done
	dir=$lab_nullb/nullb$i
	mkdir "$dir" || return
	lab_set "$dir/memory_backed" 1 || return
	lab_set "$dir/size" "$3" || return
	lab_set "$dir/blocksize" "$4" || return
	lab_set "$dir/cache_size" "$5" || return
	lab_set "$dir/discard" "$6" || return
	if [ "$7" = 0 ]; then
		lab_set "$dir/irqmode" 0 || return
	else
		lab_set "$dir/irqmode" 2 || return # a timer
		lab_set "$dir/completion_nsec" $(($7 * 1000000)) || return
	fi
	lab_set "$dir/submit_queues" "$(nproc)" || return
	lab_set "$dir/power" 1 || return
	mkdir "$1/namespaces/$2" || return
	# Older kernels count the devices instead of taking the directory's name.
	[ -b "/dev/nullb$i" ] || i=$(cat "$dir/index")
	lab_set "$1/namespaces/$2/device_path" "/dev/nullb$i" || return
	lab_set "$1/namespaces/$2/enable" 1 || return
}

lab_grant() {
	lab_set "$lab_nvmet/subsystems/${2:-$LAB_NQN}/attr_qid_max" "$1"
}

# Only a host can write protect a namespace (Set Features 84h); the target keeps
# it until the namespace is removed.
lab_readonly() {
	local nqn=${2:-$LAB_NQN} port dev status
	port=$(lab_ports "$nqn" | head -n 1)
	[ -n "$port" ] || lab_fail "readonly: no port carries $nqn" || return
	modprobe nvme-rdma || return
	dev=$(nvme connect -t rdma -a "$(cat "$port/addr_traddr")" -s "$(cat "$port/addr_trsvcid")" \
		-n "$nqn" -i 1 -o json | sed -n 's/.*"device" *: *"\([^"]*\)".*/\1/p') || return
	[ -n "$dev" ] || lab_fail "readonly: connect $nqn" || return
	nvme set-feature "/dev/$dev" -n "$1" -f 0x84 -v 1 >/dev/null
	status=$?
	nvme disconnect -d "$dev" >/dev/null
	return $status
}

lab_file() {
	local ns=$lab_nvmet/subsystems/$LAB_NQN/namespaces/$1 file=/run/lab-$1.img
	truncate -s "$2M" "$file" && mkdir "$ns" || return
	lab_set "$ns/buffered_io" 1 || return
	lab_set "$ns/device_path" "$file" || return
	lab_set "$ns/enable" 1
}

lab_resize() {
	truncate -s "$2M" "/run/lab-$1.img" || return
	lab_set "$lab_nvmet/subsystems/$LAB_NQN/namespaces/$1/revalidate_size" 1
}

lab_enable() {
	lab_set "$lab_nvmet/subsystems/$LAB_NQN/namespaces/$1/enable" "$2"
}

lab_format() {
	local ns=$lab_nvmet/subsystems/$LAB_NQN/namespaces/$1 disk
	disk=$lab_nullb/$(basename "$(cat "$ns/device_path")")
	lab_set "$ns/enable" 0 || return
	lab_set "$disk/power" 0 || return
	lab_set "$disk/blocksize" "$2" || return
	lab_set "$disk/power" 1 || return
	lab_set "$ns/enable" 1
}

lab_ana() {
	local dir=$lab_nvmet/ports/$1/ana_groups/$2
	[ -d "$dir" ] || mkdir "$dir" || return
	lab_set "$dir/ana_state" "$3"
}

lab_group() {
	lab_set "$lab_nvmet/subsystems/$LAB_NQN/namespaces/$1/ana_grpid" "$2"
}

# lab_ports NQN prints the ports that carry a subsystem.
lab_ports() {
	local link
	for link in "$lab_nvmet"/ports/*/subsystems/"$1"; do
		[ -L "$link" ] && dirname "$(dirname "$link")"
	done
}

# Counting stays on once it was started, and is only set to zero: each switch of
# a trace point patches the kernel's code, which emulation on several threads
# rarely, but sometimes, does not survive.
lab_count() {
	lab_hist "$lab_trace/nvmet/nvmet_req_init/trigger" ctrl_id,qid,opcode
	lab_hist "$lab_trace/block/block_rq_issue/trigger" dev,rwbs
}

# lab_hist TRIGGER KEYS starts a histogram, or empties it. Appending matters: a
# file opened for overwriting loses the triggers it has.
lab_hist() {
	local clear=
	grep -q "^hist:keys=$2:" "$1" && clear=:clear
	{ echo "hist:keys=$2$clear" >>"$1"; } 2>/dev/null || lab_fail "$1: kernel refuses a histogram of $2"
}

# lab_arrived prints the commands that arrived as lines "cntlid qid opcode number".
lab_arrived() {
	# { ctrl_id:          1, qid:          1, opcode:          2 } hitcount:        100
	sed -n 's/^{ ctrl_id: *\([0-9]*\), qid: *\([0-9]*\), opcode: *\([0-9]*\) } hitcount: *\([0-9]*\).*/\1 \2 \3 \4/p' \
		$lab_trace/nvmet/nvmet_req_init/hist
}

lab_counts() {
	lab_arrived | awk '{ n[sprintf("%d %02x", $2, $3)] += $4 } END { for (k in n) print k, n[k] }' | sort -n
}

lab_controllers() {
	lab_arrived | awk '$2 > 0 { n[sprintf("%d %02x", $1, $3)] += $4 } END { for (k in n) print k, n[k] }' | sort -n
}

lab_bios() {
	local file major minor
	for file in /sys/block/nullb*/dev; do
		IFS=: read -r major minor <"$file"
		sed -n "s/^{ dev: *$(((major << 20) | minor)), rwbs: *\([A-Z]*\) *} hitcount: *\([0-9]*\).*/\1 \2/p" \
			$lab_trace/block/block_rq_issue/hist
	done | awk '{ n[$1] += $2 } END { for (k in n) print k, n[k] }' | sort
}

# An address of one's own is reached without any network: rxe hands the packets
# to itself. So that they go through the cable all the same, the routes to its
# ends come before those to local addresses.
lab_wire() {
	local i
	lab_rxe || return
	modprobe veth || return
	ip link add lab1 address 02:00:00:00:00:01 mtu "$(cat /sys/class/net/eth0/mtu)" type veth \
		peer name lab2 address 02:00:00:00:00:02 mtu "$(cat /sys/class/net/eth0/mtu)" || return
	ip rule add pref 30 lookup local || return
	ip rule del pref 0 lookup local || return
	for i in 1 2; do
		ip addr add 10.0.3.$i/24 dev lab$i || return
		sysctl -qw net.ipv4.conf.lab$i.accept_local=1 net.ipv4.conf.lab$i.rp_filter=0 || return
		ip rule add pref $((20 + i)) iif lo to 10.0.3.$((3 - i)) lookup $((300 + i)) || return
		lab_end $i || return
		rdma link add rxe$i type rxe netdev lab$i || return
	done
}

# lab_end I sets up what goes away when an end of the cable goes down.
lab_end() {
	ip link set lab$1 up || return
	ip neigh replace 10.0.3.$((3 - $1)) lladdr 02:00:00:00:00:0$((3 - $1)) nud permanent dev lab$1 || return
	ip route replace 10.0.3.$((3 - $1)) dev lab$1 src 10.0.3.$1 table $((300 + $1))
}

lab_unwire() {
	ip link del lab1 || return # and so lab2, and the RDMA devices
	ip rule add pref 0 lookup local || return
	ip rule del pref 21 || return
	ip rule del pref 22 || return
	ip rule del pref 30 || return
	! nft list table inet lab >/dev/null 2>&1 || lab_mend
}

lab_far() {
	ip link set eth1 mtu "${2:-4200}" up || return
	ip addr add "$1/24" dev eth1 || return
	modprobe -a rdma_rxe rdma_ucm || return
	rdma link add rxe1 type rxe netdev eth1
}

# A namespace of its own: rxe, which has UDP port 4791 of the one it is in, leaves
# no room for another speaker of RoCEv2 there.
lab_outside() {
	local mtu=${1:-1500}
	if [ ! -e /sys/class/net/lab3 ]; then
		lab_rxe || return
		modprobe veth || return
		ip netns add outside || return
		ip link add lab3 type veth peer name lab4 netns outside || return
		ip addr add 10.0.4.2/24 dev lab3 || return
		ip addr add fd00:4::2/64 dev lab3 nodad || return
		ip -n outside addr add 10.0.4.1/24 dev lab4 || return
		ip -n outside addr add fd00:4::1/64 dev lab4 nodad || return
		ip -n outside link set lo up || return
		ip -n outside link set lab4 up || return
		ip link set lab3 up || return
		rdma link add rxe3 type rxe netdev lab3 || return
	fi
	ip link set lab3 mtu "$mtu" || return
	ip -n outside link set lab4 mtu "$mtu"
}

lab_bad() {
	local ns
	modprobe sch_netem || return
	for ns in "" outside; do
		set -- lab$([ -z "$ns" ] && echo 3 || echo 4) "$@"
		${ns:+ip netns exec $ns} tc qdisc del dev "$1" root 2>/dev/null
		[ $# = 1 ] || ${ns:+ip netns exec $ns} tc qdisc add dev "$1" root netem "${@:2}" || return
		shift
	done
}

lab_cut() {
	nft add table inet lab || return
	nft add chain inet lab input '{ type filter hook input priority 0; }' || return
	nft add rule inet lab input iifname '{ lab1, lab2 }' drop
}

# An acknowledgement is an RC packet whose opcode, the first byte behind UDP's header, is 0x11.
lab_deaf() {
	nft add table inet lab || return
	nft add chain inet lab input '{ type filter hook input priority 0; }' || return
	nft add rule inet lab input iifname lab3 udp dport 4791 @th,64,8 0x11 numgen inc mod 3 '<' 2 counter drop
}

lab_mend() {
	nft delete table inet lab
}

# lab_loses INTERFACE… drops the RoCE packets that arrive there.
lab_loses() {
	nft add table inet lab || return
	nft add chain inet lab input '{ type filter hook input priority 0; }' || return
	nft add rule inet lab input iifname "{ $1 }" udp dport 4791 drop
}

lab_down() {
	local port spare=$lab_nvmet/subsystems/$LAB_NQN-spare
	port=${2:+$lab_nvmet/ports/$2}
	[ -n "$port" ] || port=$(lab_ports "$LAB_NQN" | head -n 1)
	case $1 in
	port) rm "$port/subsystems/$LAB_NQN" ;;
	subsystem)
		mkdir "$spare" && ln -s "$spare" "$port/subsystems/" && rm "$port/subsystems/$LAB_NQN"
		;;
	device) rdma link delete rxe1 ;;
	interface) ip link set lab1 down ;;
	to) lab_loses lab2 ;;
	from) lab_loses lab1 ;;
	both) lab_loses lab1,lab2 ;;
	*) lab_fail "down: unknown '$1'" ;;
	esac
}

lab_up() {
	local port spare=$lab_nvmet/subsystems/$LAB_NQN-spare
	port=${2:+$lab_nvmet/ports/$2}
	[ -n "$port" ] || port=$(lab_wired)
	case $1 in
	port) ln -s "$lab_nvmet/subsystems/$LAB_NQN" "$port/subsystems/" ;;
	subsystem)
		ln -s "$lab_nvmet/subsystems/$LAB_NQN" "$port/subsystems/" &&
			rm "$port/subsystems/$LAB_NQN-spare" && rmdir "$spare"
		;;
	device) rdma link add rxe1 type rxe netdev lab1 ;;
	interface) lab_up_interface "$port" ;;
	to | from | both) lab_mend ;;
	*) lab_fail "up: unknown '$1'" ;;
	esac
}

# lab_wired prints the port at the end of the cable.
lab_wired() {
	local port
	for port in "$lab_nvmet"/ports/*; do
		[ "$(cat "$port/addr_traddr")" != 10.0.3.2 ] || echo "$port"
	done
}

# lab_up_interface PORT makes the RDMA devices anew: rxe's QP 1 never sends again after a
# packet that could not be sent, neither here nor at the target.
lab_up_interface() {
	local i
	rm "$1/subsystems/$LAB_NQN" || return
	for i in 1 2; do
		lab_end $i || return
		[ ! -e /sys/class/infiniband/rxe$i ] || rdma link delete rxe$i || return
		rdma link add rxe$i type rxe netdev lab$i || return
	done
	ln -s "$lab_nvmet/subsystems/$LAB_NQN" "$1/subsystems/"
}

# lab_restart SECONDS does what is seen of a target that restarts, and opens its port
# before its namespaces are there. The port is closed long enough for hosts to notice.
lab_restart() {
	local link ns subsys=$lab_nvmet/subsystems/$LAB_NQN
	link=$(lab_ports "$LAB_NQN" | head -n 1)/subsystems/$LAB_NQN
	rm "$link" || return
	for ns in "$subsys"/namespaces/*/; do
		lab_set "$ns/enable" 0 || return
	done
	sleep 1
	ln -s "$subsys" "$link" || return
	sleep "$1"
	for ns in "$subsys"/namespaces/*/; do
		lab_set "$ns/enable" 1 || return
	done
}

lab_target_down() {
	local nqn=${1:-$LAB_NQN} subsys port ns path dir host
	subsys=$lab_nvmet/subsystems/$nqn
	[ -d "$subsys" ] || return 0
	for port in $(lab_ports "$nqn"); do
		rm "$port/subsystems/$nqn" || return
		[ -z "$(ls -A "$port/subsystems")" ] || continue
		for dir in "$port"/referrals/*/ "$port"/ana_groups/[2-9]*/; do
			[ ! -d "$dir" ] || rmdir "$dir" || return
		done
		rmdir "$port" || return
	done
	for ns in "$subsys"/namespaces/*/; do
		[ -d "$ns" ] || continue
		path=$(cat "$ns/device_path")
		lab_set "$ns/enable" 0 || return
		rmdir "$ns" || return
		case $path in /run/lab-*.img) rm "$path" || return ;; esac
		for dir in "$lab_nullb"/*/; do
			[ -d "$dir" ] || continue
			if [ "/dev/$(basename "$dir")" = "$path" ] || { [ "$(cat "$dir/power")" = 1 ] &&
				[ ! -b "/dev/$(basename "$dir")" ] && [ "/dev/nullb$(cat "$dir/index")" = "$path" ]; }; then
				lab_set "$dir/power" 0 || return
				rmdir "$dir" || return
			fi
		done
	done
	for host in "$subsys"/allowed_hosts/*; do
		[ -L "$host" ] || continue
		rm "$host" || return
		rmdir "$lab_nvmet/hosts/$(basename "$host")" 2>/dev/null # fails while another subsystem allows it
	done
	rmdir "$subsys"
}

lab_initiator() {
	modprobe -r nvme-rdma && modprobe nvme-rdma "$@"
}

lab_clean() {
	local subsys status=0
	if [ -e /dev/nvme-fabrics ]; then
		nvme disconnect-all || status=1
	fi
	for subsys in "$lab_nvmet"/subsystems/*/; do
		[ -d "$subsys" ] || continue
		lab_target_down "$(basename "$subsys")" || status=1
	done
	if [ -e /sys/class/net/lab1 ]; then
		lab_unwire || status=1
	fi
	if [ -e /sys/class/net/lab3 ]; then
		ip link del lab3 || status=1 # and so lab4, and the RDMA device
		ip netns del outside || status=1
		umount /run/netns || status=1 # where its like are kept
	fi
	return $status
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
	set -u
	verb=${1:-}
	case $verb in
	rxe | target | list | referral | auth | grant | readonly | file | resize | enable | format | ana | group | \
		count | counts | controllers | bios | wire | cut | deaf | mend | down | up | restart | \
		far | outside | bad | initiator | target-down | clean)
		shift
		"lab_${verb//-/_}" "$@"
		;;
	*)
		sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
		exit 2
		;;
	esac
fi
