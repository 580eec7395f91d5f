# All targets need Go. All except lint and clean need a Debian machine, where e2e/setup
# installs missing packages (as root).
#
#	make build      build/ublk-nvmeof, and build/vm, the VM runner
#	make test       all tests: test-unit, then test-vm
#	make test-unit  format, vet, unit tests with the race detector, the commands of the README
#	make test-vm    scenarios and tests that need a kernel with ublk and RDMA;
#	                KERNELS="6.12" selects kernels, RUN=TestScenarios/name selects
#	                tests, VMFLAGS=--parallel emulates the CPUs of a VM in parallel
#	make soak       the scenarios soak* with N=100 rounds, N/2 crashes of a target with a
#	                volatile cache, and a target that adds its namespaces 10 s after it has
#	                opened its port, on KERNELS
#	make soak-native  random faults for MINUTES=15 on this machine (root), without a VM,
#	                module or RDMA device; SOAKFLAGS=flags of e2e/soak; then LATE=50 writes
#	                each that a target finishes late, over a lost path and after a crash
#	make vhost      a QEMU guest on a vhost-user-blk disk, whose server is upgraded UPGRADES=2 and
#	                killed KILLS=3 times below it, on this machine with KERNEL, without a module
#	make failover   how long requests wait when a path is lost, on a clock of instructions that
#	                does not depend on who else uses the machine, on KERNELS
#	make frozen     a target whose machine is paused for 40 s: two VMs, on KERNELS
#	make demo       a tour on this machine, without a VM, module or RDMA device
#	make demo-vm    a block device over NVMe/RDMA from end to end, in a VM
#	make bench      the comparison with the kernel's own initiator; BENCH=flags
#	make bench-compare  the micro-benchmarks, compared with those of the revision BASE=main;
#	                fails if one allocates more often; BENCH=flags and packages
#	make deb        build/ublk-nvmeof_VERSION_ARCH.deb, and build/static/ublk-nvmeof, which
#	                needs no library and has only RoCEv2
#	make test-service  the package in a VM with systemd, on KERNELS: SERVICE=boot is an
#	                installation, and from the next boot to a shutdown with I/O;
#	                SERVICE=life is upgrade, stop, late targets, connections by hand, and removal
#	make lint       golangci-lint, and the API against that of the last release
#	make clean      remove everything built except the kernels in build/cache

KERNELS ?= 6.12 7.3
KERNEL  ?= $(lastword $(KERNELS))
RUN     ?= .
BENCH   ?=
BASE    ?= main
VMFLAGS ?=
N       ?= 100
MINUTES ?= 15
SERVICE ?= boot life
KILLS   ?= 3
UPGRADES ?= 2
SOAKFLAGS ?=
LATE    ?= 50

NFPM = go run github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.43.0

# A version that sorts before the release that it leads to.
VERSION ?= 0.1.0~$(shell git show -s --date=format:%Y%m%d --format=git%cd.%h)
DEBS ?= build
RELEASE = -trimpath -ldflags '-X main.version=$(VERSION)'

GOLANGCI = go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

# The packages whose tests test-vm runs in addition to the scenarios. PACKAGE:PATTERN runs
# only the matching tests of a package. Every package whose tests call testenv.Need, because
# they need something of the machine, must be in the list.
VM_TESTS = initiator:Nvmet internal/uring poller:[Ww]atch rdma/verbs rdma/roce:Conformance/IPv6 ublk \
	nbd:Test(Kernel|Reconfigure|Disconnected) cmd/ublk-nvmeof:IOFlusher|OfAStranger|UserSees|Seccomp \
	cmd/ublk-nvmeof/internal/metrics:Promtool internal/rundir cmd/ublk-nvmeof/internal/server
# TestNoDriver is for a kernel without ublk; test-unit runs it.
VM_SKIP = ^TestNoDriver$$

VM_DIRS = $(foreach t,$(VM_TESTS),$(firstword $(subst :, ,$t)))
NEEDING_DIRS = $(patsubst ./%/,%,$(sort $(dir $(shell \
	grep -rl --include='*_test.go' --exclude-dir=e2e --exclude-dir=build 'testenv\.Need' .))))

SHELL = /bin/bash
.SHELLFLAGS = -euo pipefail -c
.NOTPARALLEL:

.PHONY: build test test-unit test-vm soak soak-native vhost failover frozen demo demo-vm bench bench-compare deb package static test-service lint clean setup vm

build: setup vm
	go build -o build/ublk-nvmeof ./cmd/ublk-nvmeof
	go build -o build/sharemem ./examples/sharemem

vm:
	go -C e2e build -o ../build/vm ./vm

setup:
	e2e/setup

test: test-unit test-vm

test-unit: setup
	unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt would change:" $$unformatted; exit 1; }
	go vet ./...
	go -C e2e vet ./...
	# Much of it is waiting, so more packages and tests at a time than there may be CPUs.
	mkdir -p build/log
	UN_REQUIRE=nbd-clients,netns,prometheus,promtool go test -race -p 4 -parallel 4 -shuffle=on ./... 2>&1 | \
		tee build/log/unit.txt || { \
		echo "failed; all of it is in build/log/unit.txt:"; \
		grep -hE '^ *--- FAIL|^FAIL|^panic:|^	+Test.* \([0-9hms.]+\)$$|DATA RACE' build/log/unit.txt | cut -c -160 | tail -n 20; exit 1; }
	# What allocates nothing is to do so without the detector, too, and times count without it.
	go test -run 'Alloc|ScrapeTime' ./...
	go run ./bench allocations
	go -C e2e test ./vm ./soak
	e2e/readme.sh

# One VM per kernel, all at the same time, because many tests wait most of the time. The short
# run on Linux 6.1 follows the first of them. Each kernel runs its share of what does not depend
# on the kernel. The VM has a time limit and shows what hangs.
test-vm: build
	missing="$(filter-out $(VM_DIRS),$(NEEDING_DIRS))"; [ -z "$$missing" ] || { echo "not in VM_TESTS: $$missing"; exit 1; }
	rm -rf build/test build/log && mkdir -p build/log
	for p in $(VM_DIRS); do go test -c -o build/test/$$p.test ./$$p; done
	go -C e2e test -c -o ../build/test/e2e.test .
	# Linux 6.1 has no ublk.
	export UN_PACKAGES='$(VM_TESTS)' UN_SKIP='$(VM_SKIP)'; pids=; \
	vm() { \
		build/vm $(VMFLAGS) --kernel $$1 --timeout 30m --out build/log/$$1 -- \
			sh -c 'cd e2e && exec ../build/test/e2e.test -test.v -test.run "$$0"' "$$2" 2>&1 | \
			sed -u "s/^/$$1: /" | tee build/log/$$1.txt; \
	}; \
	share=0; for k in $(KERNELS); do \
		export UN_SHARE=$$((share++))/$(words $(KERNELS)); \
		{ code=0; vm $$k '$(RUN)' || code=1; \
		[ $$k != $(firstword $(KERNELS)) ] || vm 6.1 '^TestScenarios$$/^nbd$$' || code=1; exit $$code; } & \
		pids+=" $$!"; \
	done; \
	failed=; for pid in $$pids; do wait $$pid || failed=1; done; [ -z "$$failed" ] || { \
		echo "failed; all of it is in build/log:"; \
		grep -hE 'FAIL|panic:|DATA RACE|left behind:|: kernel: ' build/log/*.txt | cut -c -160 | tail -n 20; exit 1; }

# The time limit of go test is for a VM runner that hangs.
soak: build
	for k in $(KERNELS); do \
		UN_SOAK=$(N) UN_DURABILITY=$$((($(N) + 1) / 2)) UN_AWAY=10 go -C e2e test -v -count=1 -timeout=250m -run '^TestScenarios$$/^(soak.*|restart)$$|^TestDurability$$' \
			-exec "$(CURDIR)/build/vm $(VMFLAGS) --kernel $$k --timeout 240m --out $(CURDIR)/build/log/$$k" . ; \
	done

soak-native: build
	go -C e2e build -o ../build/soak ./soak
	e2e/soak-native.sh -minutes $(MINUTES) $(SOAKFLAGS)
	UN_SOAK=$(LATE) go test -count=1 -timeout=90m -run '^TestLateWrite' ./initiator ./cmd/ublk-nvmeof

vhost: build
	e2e/vhost.sh build/ublk-nvmeof build/vm $(KERNEL) $(KILLS) $(UPGRADES)

failover: build
	for k in $(KERNELS); do \
		UN_ICOUNT=1 go -C e2e test -v -count=1 -timeout=60m -run '^TestScenarios$$/^failover$$' \
			-exec "$(CURDIR)/build/vm --icount --cpus 1 --kernel $$k --timeout 20m --out $(CURDIR)/build/log/$$k" . ; \
	done

frozen: build
	for k in $(KERNELS); do e2e/frozen.sh $$k; done

demo:
	command -v nbdinfo nbdcopy fio qemu-img >/dev/null || e2e/setup
	CGO_ENABLED=0 go build -o build/demo/ublk-nvmeof ./cmd/ublk-nvmeof
	e2e/demo.sh build/demo/ublk-nvmeof

demo-vm: build
	build/vm --kernel $(KERNEL) --mtu 4200 --timeout 5m -- e2e/demo-vm.sh

bench: build
	go run ./bench $(BENCH)

bench-compare:
	go run ./bench compare -base $(BASE) $(BENCH)

deb: package static

package:
	rm -rf build/package $(DEBS)/ublk-nvmeof_*.deb && mkdir -p build/package $(DEBS)
	go build $(RELEASE) -o build/package/ublk-nvmeof ./cmd/ublk-nvmeof
	build/package/ublk-nvmeof documentation build/package
	gzip -9n build/package/man/*.1
	ARCH=$$(go env GOARCH) VERSION='$(VERSION)' $(NFPM) package -f packaging/nfpm.yaml -p deb -t $(DEBS)/ublk-nvmeof_$(VERSION)_$$(go env GOARCH).deb

static:
	CGO_ENABLED=0 go build $(RELEASE) -o build/static/ublk-nvmeof ./cmd/ublk-nvmeof

# The newer package is the same program with another version.
test-service: build package
	$(MAKE) package DEBS=build/newer VERSION='$(VERSION)+1'
	for k in $(KERNELS); do for what in $(SERVICE); do e2e/service-vm.sh $$k $$what; done; done

lint:
	$(GOLANGCI) run ./...
	cd e2e && $(GOLANGCI) run --config ../.golangci.yml ./...
	e2e/apidiff.sh

clean:
	rm -rf build/ublk-nvmeof build/vm build/soak build/demo build/test build/log build/package build/static build/newer build/*.deb
