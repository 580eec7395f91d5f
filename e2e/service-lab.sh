# Functions for e2e/service-before.sh and e2e/service.sh, which source this file.

. e2e/lab.sh

base=nqn.2026-01.org.example

# connection NAME SERVICE writes the file of a connection.
connection() {
	cat >"/etc/ublk-nvmeof/$1.conf" <<-END
		traddr = $LAB_ADDR
		trsvcid = $2
		nqn = $base:$1
		nr-io-queues = 2
		ctrl-loss-tmo = -1
	END
}
