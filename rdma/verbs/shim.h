// The C side of the provider: the functions that Go calls through cgo. The
// structs that are shared with Go have the layouts of rdma.SendWR, rdma.RecvWR
// and rdma.WC. The Go side checks this at compile time.
#ifndef VERBS_SHIM_H
#define VERBS_SHIM_H

#include <stddef.h>
#include <stdint.h>

#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

// rdma.SendOp
enum send_op { OP_SEND = 1, OP_SEND_INVALIDATE, OP_WRITE, OP_READ };

// rdma.SendWR
struct send_wr {
	uint64_t id;
	uint64_t remote_addr;
	uint32_t rkey;
	uint8_t op;
	uint8_t signaled;
	uint8_t num_sge;
	uint8_t pad;
	struct ibv_sge sge[2];
};

// rdma.RecvWR
struct recv_wr {
	uint64_t id;
	struct ibv_sge sge;
};

// rdma.WC
struct wc {
	uint64_t id;
	uint32_t bytes;
	uint32_t qp_num;
	uint32_t invalidated_key;
	uint32_t vendor;
	uint8_t status;
	uint8_t flags;
	uint8_t recv;
	uint8_t pad[5];
};

_Static_assert(sizeof(struct send_wr) == 56, "size of rdma.SendWR");
_Static_assert(offsetof(struct send_wr, sge) == 24, "offset of rdma.SendWR.SGE");
_Static_assert(sizeof(struct recv_wr) == 24, "size of rdma.RecvWR");
_Static_assert(sizeof(struct wc) == 32, "size of rdma.WC");

// The result of posting a batch: the number of posted work requests, and an errno.
struct posted {
	int taken;
	int err;
};

// load_driver loads the part of libibverbs for a kind of device, if it is there and
// unambiguous. It is loaded once, and for good.
void load_driver(const char *name);

// On the data path Go passes the pointers of the library as numbers, because cgo looks at each
// pointer whether it leads to memory of Go, which takes longer than some of these functions.
struct posted post_send(uintptr_t qp, const struct send_wr *wrs, int n);
struct posted post_recv(uintptr_t qp, const struct recv_wr *wrs, int n);
int poll_cq(uintptr_t cq, struct wc *wcs, int n); // completions, or -errno
int arm_cq(uintptr_t cq);                         // 0 or errno
void ack_cq(uintptr_t cq, unsigned int n);

// A connection manager event, copied so that it can be acknowledged at once.
struct cm_event {
	struct rdma_cm_id *id;
	int type;
	int status;
	uint8_t private_len;
	uint8_t private_data[256];
};

// An asynchronous event of a device. It sets those of qp, cq and port that apply.
struct async_event {
	int type;
	int port;
	struct ibv_qp *qp;
	struct ibv_cq *cq;
};

int next_cm_event(struct rdma_event_channel *channel, struct cm_event *out); // 0 or errno
int next_async_event(struct ibv_context *context, struct async_event *out);  // 0 or errno

// rdma_conn_param without pointers.
struct conn {
	uint8_t responder_resources;
	uint8_t initiator_depth;
	uint8_t flow_control;
	uint8_t retry_count;
	uint8_t rnr_retry_count;
	uint8_t private_len;
	uint8_t private_data[256];
};

int cm_connect(struct rdma_cm_id *id, const struct conn *conn); // 0 or errno
int cm_accept(struct rdma_cm_id *id, const struct conn *conn);  // 0 or errno

struct ibv_mr *reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access);
struct rdma_cm_id *hold_device(struct rdma_cm_id *id, struct rdma_event_channel *channel);
void detach_device(struct ibv_context *context);

#endif
