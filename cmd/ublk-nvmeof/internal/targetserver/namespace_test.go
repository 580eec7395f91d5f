package targetserver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
)

// TestSizesThatCannotBe: impossible sizes are errors, and the target continues.
func TestSizesThatCannotBe(t *testing.T) {
	o := disk(t, "ram=1MiB")
	o.Memory = 4 << 20
	client, _ := begin(t, o)
	refuse := func(request any, code exit.Code, text string) {
		t.Helper()
		if _, err := client.Do(t.Context(), request); exit.Of(err) != code || !strings.Contains(err.Error(), text) {
			t.Errorf("%+v: %v (%d)", request, err, exit.Of(err))
		}
	}
	refuse(AddRequest{Namespace: "ram=100TiB"}, exit.Usage, "exceed the limit of 4.0 MiB")
	refuse(AddRequest{Namespace: "ram=2MiB,cache=2MiB"}, exit.Usage, "exceed the limit")
	refuse(ResizeRequest{NSID: 1, Size: 1 << 50}, exit.Usage, "exceed the limit")
	refuse(ResizeRequest{NSID: 1, Size: 1<<63 - 1}, exit.Usage, "want at most")
	refuse(ResizeRequest{NSID: 1, Size: -1}, exit.Usage, "a size is needed")
	refuse(ResizeRequest{NSID: 1, Size: 1000}, exit.Other, "not a positive multiple of the block size")
	// A refused request takes nothing of the limit, and the removal of a namespace
	// gives memory back.
	do(t, client, ResizeRequest{NSID: 1, Size: 4 << 20})
	refuse(AddRequest{Namespace: "ram=512B"}, exit.Usage, "exceed the limit")
	do(t, client, RemoveRequest{NSID: 1})
	refuse(AddRequest{Namespace: "ram=2MiB,cache=1GiB"}, exit.Usage, "cache=1.0 GiB: want at most the size of the namespace, 2.0 MiB")
	do(t, client, AddRequest{Namespace: "ram=2MiB,cache=2MiB"})
	do(t, client, RemoveRequest{NSID: 1})
	do(t, client, AddRequest{Namespace: "ram=4MiB"})
	do(t, client, ResizeRequest{NSID: 1, Size: 1 << 20})
	do(t, client, AddRequest{Namespace: "ram=3MiB"})
}

// TestPanicLeavesNoLock: even if a request panics, the next one is answered.
func TestPanicLeavesNoLock(t *testing.T) {
	s := &server{}
	func() {
		defer func() { _ = recover() }()
		_, _ = locked(s, func(StallRequest) (Done, error) { panic("x") })(StallRequest{})
	}()
	if !s.mu.TryLock() {
		t.Error("the lock is held")
	}
}

// TestFiles: a file can have one namespace, unless all its namespaces say that they
// share it. It is free again when they are removed.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "a,b"), filepath.Join(dir, "link")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	words := strings.ReplaceAll(file, ",", ",,")
	client, _ := begin(t, disk(t, "file="+words))
	refuse := func(namespace string, code exit.Code, text string) {
		t.Helper()
		if _, err := client.Do(t.Context(), AddRequest{Namespace: namespace}); exit.Of(err) != code || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v (%d)", namespace, err, exit.Of(err))
		}
	}
	refuse("file="+link, exit.Busy, "in use by another namespace")
	refuse("file="+words+",shared", exit.Busy, "in use by another namespace")
	refuse("device="+words, exit.Busy, "in use")
	refuse("file=/dev/zero", exit.Usage, "not storage; want a block device, or a regular file")
	refuse("file=/proc/self/status", exit.Usage, "not storage; want a block device, or a regular file")
	refuse("file="+dir, exit.Usage, "not storage; want a block device, or a regular file")
	do(t, client, RemoveRequest{NSID: 1})
	refuse("device="+words, exit.Usage, "is a file; want file=")
	do(t, client, AddRequest{Namespace: "file=" + words + ",shared"})
	do(t, client, AddRequest{Namespace: "file=" + link + ",shared"})
}

// TestSameIdentity: after a restart a target has namespaces with the same identities,
// even if a symbolic link names a file.
func TestSameIdentity(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "disk"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(file, make([]byte, 1<<20), 0o600), os.Symlink("disk", link)); err != nil {
		t.Fatal(err)
	}
	const given = "12345678-1234-1234-1234-123456789abc"
	var ids [2][3]string
	for i := range ids {
		t.Run("", func(t *testing.T) { // the end of the subtest ends the target
			client, _ := begin(t, disk(t, "file="+[]string{file, link}[i], "ram=1MiB", "ram=1MiB,uuid="+given))
			s, err := client.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for n, ns := range s.Subsystems[0].Namespaces {
				ids[i][n] = ns.UUID
				if ns.NewAtStart != (n == 1) {
					t.Errorf("%+v", ns)
				}
			}
		})
	}
	if ids[0][0] != ids[1][0] || ids[0][0] == "" || ids[0][1] == ids[1][1] || ids[0][2] != given || ids[1][2] != given {
		t.Errorf("%q", ids)
	}
}

// TestNamespacesAfter: a host finds the port open before the namespaces exist.
func TestNamespacesAfter(t *testing.T) {
	o := disk(t, "ram=1MiB")
	o.NamespacesAfter = time.Hour
	client, _ := begin(t, o)
	c, err := connect(t, 1)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(c.Namespaces()); n != 0 {
		t.Errorf("%d namespaces", n)
	}
	s, err := client.Status(t.Context())
	if err != nil || !s.Faults.Hidden {
		t.Errorf("%+v, %v", s.Faults, err)
	}
	do(t, client, HideRequest{Milliseconds: 1})
	eventually(t, "a namespace", func() bool { return len(c.Namespaces()) == 1 })
}
