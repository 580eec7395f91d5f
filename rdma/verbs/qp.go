//go:build linux && cgo && !noverbs

package verbs

/*
#cgo noescape post_send
#cgo nocallback post_send
#cgo noescape post_recv
#cgo nocallback post_recv
#include "shim.h"
*/
import "C"

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"ublk-nvmeof/rdma"
)

// The structs of package rdma must have the layout of the C structs that post_send and
// post_recv read.
var (
	_ [unsafe.Sizeof(C.struct_send_wr{})]byte               = [unsafe.Sizeof(rdma.SendWR{})]byte{}
	_ [unsafe.Offsetof(C.struct_send_wr{}.id)]byte          = [unsafe.Offsetof(rdma.SendWR{}.ID)]byte{}
	_ [unsafe.Offsetof(C.struct_send_wr{}.remote_addr)]byte = [unsafe.Offsetof(rdma.SendWR{}.RemoteAddr)]byte{}
	_ [unsafe.Offsetof(C.struct_send_wr{}.rkey)]byte        = [unsafe.Offsetof(rdma.SendWR{}.RKey)]byte{}
	_ [unsafe.Offsetof(C.struct_send_wr{}.op)]byte          = [unsafe.Offsetof(rdma.SendWR{}.Op)]byte{}
	_ [unsafe.Offsetof(C.struct_send_wr{}.signaled)]byte    = [unsafe.Offsetof(rdma.SendWR{}.Signaled)]byte{}
	_ [unsafe.Offsetof(C.struct_send_wr{}.num_sge)]byte     = [unsafe.Offsetof(rdma.SendWR{}.NumSGE)]byte{}
	_ [unsafe.Offsetof(C.struct_send_wr{}.sge)]byte         = [unsafe.Offsetof(rdma.SendWR{}.SGE)]byte{}

	_ [unsafe.Sizeof(C.struct_recv_wr{})]byte       = [unsafe.Sizeof(rdma.RecvWR{})]byte{}
	_ [unsafe.Offsetof(C.struct_recv_wr{}.id)]byte  = [unsafe.Offsetof(rdma.RecvWR{}.ID)]byte{}
	_ [unsafe.Offsetof(C.struct_recv_wr{}.sge)]byte = [unsafe.Offsetof(rdma.RecvWR{}.SGE)]byte{}

	_ [unsafe.Sizeof(C.struct_ibv_sge{})]byte          = [unsafe.Sizeof(rdma.SGE{})]byte{}
	_ [unsafe.Offsetof(C.struct_ibv_sge{}.addr)]byte   = [unsafe.Offsetof(rdma.SGE{}.Addr)]byte{}
	_ [unsafe.Offsetof(C.struct_ibv_sge{}.length)]byte = [unsafe.Offsetof(rdma.SGE{}.Length)]byte{}
	_ [unsafe.Offsetof(C.struct_ibv_sge{}.lkey)]byte   = [unsafe.Offsetof(rdma.SGE{}.LKey)]byte{}

	_ [C.OP_SEND]byte            = [rdma.Send]byte{}
	_ [C.OP_SEND_INVALIDATE]byte = [rdma.SendInvalidate]byte{}
	_ [C.OP_WRITE]byte           = [rdma.Write]byte{}
	_ [C.OP_READ]byte            = [rdma.Read]byte{}
)

// qp is a reliable-connected queue pair. It lives as long as its ID.
type qp struct {
	c      *C.struct_ibv_qp
	num    uint32
	recvCQ *cq
	sendCQ *cq

	destroyed atomic.Bool // written with mu held

	mu     sync.Mutex // guards the fields below, and c until it is destroyed
	failed bool
}

// newQP makes the queue pair of an ID. librdmacm changes its state.
func newQP(cid *C.struct_rdma_cm_id, domain *pd, cfg rdma.QPConfig) (*qp, error) {
	send, okSend := cfg.SendCQ.(*cq)
	recv, okRecv := cfg.RecvCQ.(*cq)
	if !okSend || !okRecv {
		return nil, fmt.Errorf("create queue pair: completion queues of another provider: %w", unix.EINVAL)
	}
	domain.mu.RLock()
	defer domain.mu.RUnlock()
	if domain.closed || send.closed.Load() || recv.closed.Load() {
		return nil, fmt.Errorf("create queue pair: %w", rdma.ErrClosed)
	}
	attr := C.struct_ibv_qp_init_attr{
		send_cq: send.c,
		recv_cq: recv.c,
		qp_type: C.IBV_QPT_RC,
		cap: C.struct_ibv_qp_cap{
			max_send_wr:  C.uint32_t(cfg.MaxSendWR),
			max_recv_wr:  C.uint32_t(cfg.MaxRecvWR),
			max_send_sge: C.uint32_t(max(1, cfg.MaxSendSGE)),
			max_recv_sge: C.uint32_t(max(1, cfg.MaxRecvSGE)),
		},
	}
	if ret, err := C.rdma_create_qp(cid, domain.c, &attr); ret != 0 {
		return nil, missing(fmt.Sprintf("create queue pair of %d+%d work requests", cfg.MaxSendWR, cfg.MaxRecvWR), err)
	}
	return &qp{c: cid.qp, num: uint32(cid.qp.qp_num), sendCQ: send, recvCQ: recv}, nil
}

var errDestroyed = fmt.Errorf("post: queue pair is destroyed: %w", rdma.ErrClosed)

// Num implements rdma.QP.
func (q *qp) Num() uint32 { return q.num }

// handle returns the queue pair for the functions of the data path.
func (q *qp) handle() C.uintptr_t { return C.uintptr_t(uintptr(unsafe.Pointer(q.c))) }

// PostSend implements rdma.QP.
func (q *qp) PostSend(wrs []rdma.SendWR) (int, error) {
	switch {
	case q.destroyed.Load():
		return 0, errDestroyed
	case len(wrs) == 0:
		return 0, nil
	}
	done := C.post_send(q.handle(), (*C.struct_send_wr)(unsafe.Pointer(&wrs[0])), C.int(len(wrs)))
	if done.err != 0 {
		return int(done.taken), fmt.Errorf("post send: %w", unix.Errno(done.err))
	}
	return int(done.taken), nil
}

// PostRecv implements rdma.QP.
func (q *qp) PostRecv(wrs []rdma.RecvWR) (int, error) {
	switch {
	case q.destroyed.Load():
		return 0, errDestroyed
	case len(wrs) == 0:
		return 0, nil
	}
	done := C.post_recv(q.handle(), (*C.struct_recv_wr)(unsafe.Pointer(&wrs[0])), C.int(len(wrs)))
	if done.err != 0 {
		return int(done.taken), fmt.Errorf("post receive: %w", unix.Errno(done.err))
	}
	return int(done.taken), nil
}

// Fail implements rdma.QP. After the ID was closed, it does nothing.
func (q *qp) Fail() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.failed || q.destroyed.Load() {
		return nil
	}
	attr := C.struct_ibv_qp_attr{qp_state: C.IBV_QPS_ERR}
	if err := destroyed("", C.ibv_modify_qp(q.c, &attr, C.IBV_QP_STATE)); err != nil {
		return fmt.Errorf("move queue pair %d to the error state: %w", q.num, err)
	}
	q.failed = true
	return nil
}

// destroy destroys the queue pair. The ID must not be able to use it any more.
func (q *qp) destroy() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.destroyed.Load() {
		return nil
	}
	q.destroyed.Store(true)
	return destroyed(fmt.Sprintf("queue pair %d", q.num), C.ibv_destroy_qp(q.c))
}
