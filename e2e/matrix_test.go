package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
)

// grants are what the target of TestSplitMatrix grants at most.
var grants = [...]int{1, 2, 3, 4, 5, 8}

// splits are what each request is split into on a machine with 4 CPUs, for each
// of the grants. Numbers are read/default/poll queues; the request is I/O, write
// and poll queues as the flags say.
var splits = []struct {
	request string
	asked   string // per class, no more than CPUs
	granted [len(grants)]string
}{
	{"4/0/0", "0/4/0", [...]string{"0/1/0", "0/2/0", "0/3/0", "0/4/0", "0/4/0", "0/4/0"}},
	{"2/2/2", "2/2/2", [...]string{"0/1/0", "0/2/0", "2/1/0", "2/2/0", "2/2/1", "2/2/2"}},
	{"4/4/0", "4/4/0", [...]string{"0/1/0", "0/2/0", "0/3/0", "0/4/0", "4/1/0", "4/4/0"}},
	{"4/0/2", "0/4/2", [...]string{"0/1/0", "0/2/0", "0/3/0", "0/4/0", "0/4/1", "0/4/2"}},
	{"1/1/1", "1/1/1", [...]string{"0/1/0", "1/1/0", "1/1/1", "1/1/1", "1/1/1", "1/1/1"}},
	{"4/6/1", "4/4/1", [...]string{"0/1/0", "0/2/0", "0/3/0", "0/4/0", "4/1/0", "4/4/0"}},
}

// perClass is numbers of queues.
type perClass struct{ read, def, poll int }

func parseCounts(t *testing.T, s string) (c perClass) {
	t.Helper()
	if _, err := fmt.Sscanf(s, "%d/%d/%d", &c.read, &c.def, &c.poll); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c perClass) total() int { return c.read + c.def + c.poll }

// TestSplitMatrix connects with every request to a target that grants every
// number of queues, and checks what is reported, that data is right, and which
// commands arrive on which queue. The split does not depend on the kernel, so
// with several kernels each one runs its share of the cases, in which every
// request and every grant occurs.
func TestSplitMatrix(t *testing.T) {
	if n := runtime.NumCPU(); n != 4 {
		t.Fatalf("the table is for 4 CPUs, here are %d", n)
	}
	leavesNothing(t)
	run(t, "lab", "rxe", labMTU)
	run(t, "lab", "target", "size=64")
	t.Cleanup(func() { run(t, "lab", "clean") })
	mine, shares := share(t)
	for row, s := range splits {
		for i, grant := range grants {
			if (row+i)%shares != mine {
				continue
			}
			t.Run(fmt.Sprintf("%s of %d", strings.ReplaceAll(s.request, "/", "+"), grant), func(t *testing.T) {
				testSplit(t, parseCounts(t, s.request), parseCounts(t, s.asked), grant, parseCounts(t, s.granted[i]))
			})
		}
	}
}

// share returns which part of how many UN_SHARE ("part/parts") names: all of it
// if UN_SHARE is not set.
func share(t *testing.T) (part, parts int) {
	t.Helper()
	text := os.Getenv("UN_SHARE")
	if text == "" {
		return 0, 1
	}
	if _, err := fmt.Sscanf(text, "%d/%d", &part, &parts); err != nil || part < 0 || part >= parts {
		t.Fatalf("UN_SHARE is %q, want PART/PARTS with PART less than PARTS", text)
	}
	return part, parts
}

func testSplit(t *testing.T, request, asked perClass, grant int, want perClass) {
	run(t, "lab", "grant", fmt.Sprint(grant))
	run(t, "ublk-nvmeof", "connect", "-a", labAddr, "-n", labNQN, "--device-id=0", "-Q32",
		fmt.Sprintf("-i%d", request.read), fmt.Sprintf("-W%d", request.def), fmt.Sprintf("-P%d", request.poll))
	defer run(t, "ublk-nvmeof", "disconnect", "-n", labNQN)

	mapped := func(queues int, own string) string {
		if queues == 0 {
			return "default"
		}
		return own
	}
	wantQueues := queues{
		Requested: asked.total(), Granted: want.total(),
		Read:    class{asked.read, want.read, mapped(want.read, "read")},
		Default: class{asked.def, want.def, "default"},
		Poll:    class{asked.poll, want.poll, mapped(want.poll, "poll")},
	}
	if got := listServers(t)[0].Queues; got != wantQueues {
		t.Errorf("list reports %+v, want %+v", got, wantQueues)
	}

	// Small requests are polled, if anything is, larger ones not. A job on each
	// CPU reaches the queues of every loop.
	run(t, "lab", "count")
	run(t, "fio", "--name=verify", "--filename=/dev/ublkb0", "--ioengine=io_uring", "--direct=1", "--iodepth=16",
		"--rw=randrw", "--bssplit=512/15:4k/20:16k/15:20k/25:64k/25", "--randrepeat=0", "--serialize_overlap=1",
		"--numjobs=4", "--cpus_allowed=0-3", "--cpus_allowed_policy=split", "--thread", "--size=1m", "--offset_increment=8m",
		"--verify=crc32c", "--verify_fatal=1", "--verify_dump=0")
	reads, writes := arrived(t)
	starved := asked.poll > 0 && want.poll == 0 // what would be polled is in the default queues
	for qid := 1; qid <= maxQueues; qid++ {
		r, w := reads[qid], writes[qid]
		switch isDefault, isRead := qid <= want.def, qid > want.def && qid <= want.def+want.read; {
		case qid > want.total() && r+w > 0:
			t.Errorf("queue %d was not granted and saw %d commands", qid, r+w)
		case qid <= want.total() && r+w == 0:
			t.Errorf("queue %d was granted and saw no command", qid)
		case isRead && w > 0:
			t.Errorf("read queue %d saw %d writes", qid, w)
		case isDefault && want.read > 0 && r > 0 && !starved:
			t.Errorf("default queue %d saw %d reads", qid, r)
		}
	}
}

// maxQueues is beyond what any request of TestSplitMatrix is granted.
const maxQueues = 16

// arrived is how many reads and writes the target saw on each I/O queue since
// "lab count".
func arrived(t *testing.T) (reads, writes map[int]int) {
	t.Helper()
	reads, writes = map[int]int{}, map[int]int{}
	for line := range strings.Lines(run(t, "lab", "counts")) {
		var qid, opcode, n int
		if _, err := fmt.Sscanf(line, "%d %x %d", &qid, &opcode, &n); err != nil {
			t.Fatalf("lab counts: %q: %v", line, err)
		}
		switch {
		case qid == 0:
		case opcode == 1:
			writes[qid] = n
		case opcode == 2:
			reads[qid] = n
		}
	}
	return reads, writes
}

// server is what "list -o json" says of a server, as far as it matters here.
type server struct {
	PID    int    `json:"pid"`
	Queues queues `json:"queues"`
}

type queues struct {
	Requested int   `json:"requested"`
	Granted   int   `json:"granted"`
	Read      class `json:"read"`
	Default   class `json:"default"`
	Poll      class `json:"poll"`
}

type class struct {
	Requested int    `json:"requested"`
	Granted   int    `json:"granted"`
	Mapped    string `json:"mapped"`
}

func listServers(t *testing.T) []server {
	t.Helper()
	var list struct {
		Controllers []server `json:"controllers"`
	}
	out := run(t, "ublk-nvmeof", "list", "-o", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list.Controllers) == 0 {
		t.Fatalf("list: %v\n%s", err, out)
	}
	return list.Controllers
}
