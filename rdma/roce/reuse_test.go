package roce

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"

	"ublk-nvmeof/rdma"
	"ublk-nvmeof/rdma/roce/wire"
)

// TestReusedBuffers checks that the sender of a message may change its memory as soon as
// the peer has answered, although the SEND is not complete: what the peer receives is what
// the memory held when the message was posted. Three of four acknowledgements are lost, so the
// sender repeats messages from memory that has changed.
func TestReusedBuffers(t *testing.T) {
	const connections, messages = 16, 16
	loseAcks := func() func([]byte, func([]byte)) {
		acks := make(map[[3]byte]int) // by queue pair: its retries are limited
		return func(packet []byte, deliver func([]byte)) {
			if wire.Opcode(packet[0]) == wire.Acknowledge {
				to := [3]byte(packet[5:])
				if acks[to]++; acks[to]%6 != 0 {
					return
				}
			}
			deliver(packet)
		}
	}
	host := open(t, Config{Addrs: []netip.Addr{hostAddr}, tamper: loseAcks})
	target := open(t, Config{Addrs: []netip.Addr{targetAddr}, tamper: through(func(seed uint64) *link { return newLink(seed, 0.01, 0.01, 0, 0) })})
	var all []*reuser
	for i := range connections {
		r := &reuser{rnd: rand.New(rand.NewPCG(1, uint64(i)))}
		r.host, r.target = join(t, host, target, posted+1, slots*(slot+answerSize), false)
		all = append(all, r)
	}
	done := make(chan error)
	for _, r := range all {
		go func() { done <- r.run(messages) }()
	}
	for range all {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	h, g := host.Snapshot(), target.Snapshot()
	if h.Retransmits == 0 || g.Duplicates == 0 {
		t.Errorf("no message was repeated: host %+v, target %+v", h, g)
	}
}

const (
	answerSize = 4         // bytes: the checksum of a message
	posted     = 3 * slots // SENDs that are not known to be complete; with more, too many would be confirmed in time
)

// reuser is a connection whose host sends messages from slots. It fills a slot with the
// next message as soon as the target has answered the last one.
type reuser struct {
	host, target *end
	rnd          *rand.Rand
	ready        []int // slots without a message
	sent         int
	confirmed    int           // number of SENDs that are known to be complete
	want         [slots]uint32 // checksums of the messages in flight
	wcs          [slots]rdma.WC
}

// run sends messages until so many were answered.
func (r *reuser) run(messages int) error {
	for i := range slots {
		r.target.recv(uint64(i), i*slot, slot)
	}
	for i := range slots {
		r.ready = append(r.ready, i)
	}
	for answered := 0; answered < messages; runtime.Gosched() {
		for ; len(r.ready) > 0 && r.sent-r.confirmed < posted; r.ready = r.ready[1:] {
			r.send(r.ready[0])
		}
		for _, step := range []struct {
			cq rdma.CQ
			do func(*rdma.WC) error
		}{
			{r.target.recvCQ, r.answer}, {r.host.recvCQ, r.check}, {r.host.sendCQ, r.confirm}, {r.target.sendCQ, func(*rdma.WC) error { return nil }},
		} {
			n, err := step.cq.Poll(r.wcs[:])
			if err != nil {
				return err
			}
			for i := range r.wcs[:n] {
				if wc := &r.wcs[i]; wc.Status != rdma.WCSuccess {
					return fmt.Errorf("after %d answers: %v", answered, wc.Status)
				}
				if err := step.do(&r.wcs[i]); err != nil {
					return fmt.Errorf("after %d answers: %w", answered, err)
				}
			}
			if step.cq == r.host.recvCQ {
				answered += n
			}
		}
	}
	return nil
}

// send fills a slot and sends its message.
func (r *reuser) send(i int) {
	message := r.host.mr.Bytes()[i*slot:][:8+r.rnd.IntN(3*4096)]
	for at := 0; at+8 <= len(message); at += 8 {
		binary.LittleEndian.PutUint64(message[at:], r.rnd.Uint64())
	}
	r.want[i] = crc32.ChecksumIEEE(message)
	r.host.recv(uint64(i), slots*slot+i*answerSize, answerSize)
	wr := r.host.wr(uint64(r.sent), rdma.Send, i*slot, len(message), r.target, 0)
	r.sent++
	wr.Signaled = r.sent%slots == 0
	r.host.post(wr)
}

// answer answers a message with its checksum.
func (r *reuser) answer(wc *rdma.WC) error {
	i := int(wc.ID)
	memory := r.target.mr.Bytes()
	binary.LittleEndian.PutUint32(memory[slots*slot+i*answerSize:], crc32.ChecksumIEEE(memory[i*slot:][:wc.Bytes]))
	r.target.recv(wc.ID, i*slot, slot)
	r.target.post(r.target.wr(wc.ID, rdma.Send, slots*slot+i*answerSize, answerSize, r.host, 0))
	return nil
}

// confirm takes the completion of a SEND, which confirms those before it.
func (r *reuser) confirm(wc *rdma.WC) error {
	r.confirmed = int(wc.ID) + 1
	return nil
}

// check compares an answer with what was sent.
func (r *reuser) check(wc *rdma.WC) error {
	i := int(wc.ID)
	if got := binary.LittleEndian.Uint32(r.host.mr.Bytes()[slots*slot+i*answerSize:]); got != r.want[i] {
		return fmt.Errorf("checksum %#x, want %#x: the peer received other data", got, r.want[i])
	}
	r.ready = append(r.ready, i)
	return nil
}
