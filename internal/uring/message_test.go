package uring

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMessage sends pieces through a socket and receives them in other pieces. One
// transfer ends in the middle of a piece.
func TestMessage(t *testing.T) {
	r := newRing(t, Config{Entries: 8, Loop: true})
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	out, in := NewMessage(3), NewMessage(2)
	out.Add([]byte("head"))
	out.Add(nil)
	out.Add([]byte("er and "))
	out.Add([]byte("data"))
	if out.Room() != 0 || out.Len() != 15 {
		t.Fatalf("room for %d, %d bytes", out.Room(), out.Len())
	}
	out.Advance(6)
	if out.Len() != 9 {
		t.Fatalf("%d bytes after advancing", out.Len())
	}
	s := r.SQE()
	s.SetSend(fds[0], out)
	s.UserData = 1
	submit(t, r)
	if c := take(t, r); c.UserData != 1 || c.Res != 9 {
		t.Fatalf("send: %+v", c)
	}
	first, second := make([]byte, 2), make([]byte, 10)
	in.Add(first)
	in.Add(second)
	s = r.SQE()
	s.SetRecv(fds[1], in)
	s.UserData = 2
	submit(t, r)
	if c := take(t, r); c.UserData != 2 || c.Res != 9 {
		t.Fatalf("receive: %+v", c)
	}
	if got := bytes.Join([][]byte{first, second[:7]}, nil); string(got) != " and data" {
		t.Errorf("received %q", got)
	}
	out.Advance(9)
	if out.Len() != 0 {
		t.Errorf("%d bytes are left", out.Len())
	}
	out.Reset()
	if out.Room() != 3 {
		t.Errorf("room for %d after reset", out.Room())
	}
}

func submit(t testing.TB, r *Ring) {
	t.Helper()
	if err := r.Submit(); err != nil {
		t.Fatal(err)
	}
}
