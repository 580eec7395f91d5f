//go:build linux && cgo && !noverbs

#define _GNU_SOURCE
#include "shim.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

void load_driver(const char *name)
{
	Dl_info lib;
	char pattern[4096];
	glob_t found;
	// Not its address here, which can be that of a stub in the program.
	void *symbol = dlsym(RTLD_DEFAULT, "ibv_get_device_list");

	if (!symbol || !dladdr(symbol, &lib) || !strrchr(lib.dli_fname, '/'))
		return;
	snprintf(pattern, sizeof pattern, "%.*s/libibverbs/lib%s-rdmav*.so",
		 (int)(strrchr(lib.dli_fname, '/') - lib.dli_fname), lib.dli_fname, name);
	if (glob(pattern, 0, NULL, &found))
		return;
	if (found.gl_pathc == 1)
		dlopen(found.gl_pathv[0], RTLD_NOW); // it registers itself with libibverbs
	globfree(&found);
}

// The number of work requests that are chained on the stack for one call of the
// driver. rdma_rxe makes one system call per chain, and hardware rings one doorbell.
enum { CHUNK = 64 };

static int opcode(uint8_t op)
{
	switch (op) {
	case OP_SEND:
		return IBV_WR_SEND;
	case OP_SEND_INVALIDATE:
		return IBV_WR_SEND_WITH_INV;
	case OP_WRITE:
		return IBV_WR_RDMA_WRITE;
	case OP_READ:
		return IBV_WR_RDMA_READ;
	}
	return -1;
}

struct posted post_send(uintptr_t qp, const struct send_wr *wrs, int n)
{
	struct ibv_send_wr chain[CHUNK], *bad;
	struct posted done = {0, 0};

	while (done.taken < n) {
		int len = n - done.taken < CHUNK ? n - done.taken : CHUNK;

		for (int i = 0; i < len; i++) {
			const struct send_wr *wr = &wrs[done.taken + i];
			int op = opcode(wr->op);

			if (op < 0 || wr->num_sge > 2) {
				done.err = EINVAL;
				len = i; // post the work requests before it
				break;
			}
			chain[i].wr_id = wr->id;
			chain[i].next = &chain[i + 1];
			chain[i].sg_list = (struct ibv_sge *)wr->sge;
			chain[i].num_sge = wr->num_sge;
			chain[i].opcode = op;
			chain[i].send_flags = wr->signaled ? IBV_SEND_SIGNALED : 0;
			chain[i].invalidate_rkey = wr->rkey; // used with OP_SEND_INVALIDATE only
			chain[i].wr.rdma.remote_addr = wr->remote_addr;
			chain[i].wr.rdma.rkey = wr->rkey;
		}
		if (len == 0)
			return done;
		chain[len - 1].next = NULL;

		int err = ibv_post_send((struct ibv_qp *)qp, chain, &bad);
		if (err) {
			done.taken += (int)(bad - chain);
			done.err = err < 0 ? -err : err;
			return done;
		}
		done.taken += len;
		if (done.err)
			return done;
	}
	return done;
}

struct posted post_recv(uintptr_t qp, const struct recv_wr *wrs, int n)
{
	struct ibv_recv_wr chain[CHUNK], *bad;
	struct posted done = {0, 0};

	while (done.taken < n) {
		int len = n - done.taken < CHUNK ? n - done.taken : CHUNK;

		for (int i = 0; i < len; i++) {
			const struct recv_wr *wr = &wrs[done.taken + i];

			chain[i].wr_id = wr->id;
			chain[i].next = &chain[i + 1];
			chain[i].sg_list = (struct ibv_sge *)&wr->sge;
			chain[i].num_sge = 1;
		}
		chain[len - 1].next = NULL;

		int err = ibv_post_recv((struct ibv_qp *)qp, chain, &bad);
		if (err) {
			done.taken += (int)(bad - chain);
			done.err = err < 0 ? -err : err;
			return done;
		}
		done.taken += len;
	}
	return done;
}

int poll_cq(uintptr_t cq, struct wc *wcs, int n)
{
	struct ibv_wc got[CHUNK];
	int done = 0;

	while (done < n) {
		int want = n - done < CHUNK ? n - done : CHUNK;
		int len = ibv_poll_cq((struct ibv_cq *)cq, want, got);

		if (len < 0)
			return done ? done : -EIO;
		for (int i = 0; i < len; i++) {
			struct wc *wc = &wcs[done + i];

			wc->id = got[i].wr_id;
			wc->status = (uint8_t)got[i].status;
			wc->qp_num = got[i].qp_num;
			wc->vendor = got[i].vendor_err;
			// For a failed work request, the library sets no other fields.
			int ok = got[i].status == IBV_WC_SUCCESS;
			int inv = ok && (got[i].wc_flags & IBV_WC_WITH_INV);
			wc->recv = ok && (got[i].opcode & IBV_WC_RECV);
			wc->bytes = wc->recv ? got[i].byte_len : 0;
			wc->flags = inv ? 1 : 0;
			wc->invalidated_key = inv ? got[i].invalidated_rkey : 0;
		}
		done += len;
		if (len < want)
			break;
	}
	return done;
}

int arm_cq(uintptr_t cq)
{
	int err = ibv_req_notify_cq((struct ibv_cq *)cq, 0);

	return err < 0 ? -err : err;
}

void ack_cq(uintptr_t cq, unsigned int n)
{
	ibv_ack_cq_events((struct ibv_cq *)cq, n);
}

int next_cm_event(struct rdma_event_channel *channel, struct cm_event *out)
{
	struct rdma_cm_event *event;

	if (rdma_get_cm_event(channel, &event))
		return errno ? errno : EIO;
	out->id = event->id;
	out->type = event->event;
	out->status = event->status;
	out->private_len = 0;
	switch (event->event) {
	case RDMA_CM_EVENT_CONNECT_REQUEST:
	case RDMA_CM_EVENT_CONNECT_RESPONSE:
	case RDMA_CM_EVENT_ESTABLISHED:
	case RDMA_CM_EVENT_REJECTED:
		if (event->param.conn.private_data) {
			out->private_len = event->param.conn.private_data_len;
			memcpy(out->private_data, event->param.conn.private_data, out->private_len);
		}
		break;
	default:
		break;
	}
	rdma_ack_cm_event(event);
	return 0;
}

int next_async_event(struct ibv_context *context, struct async_event *out)
{
	struct ibv_async_event event;

	errno = 0;
	if (ibv_get_async_event(context, &event))
		return errno ? errno : EIO;
	memset(out, 0, sizeof *out);
	out->type = event.event_type;
	switch (event.event_type) {
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_COMM_EST:
	case IBV_EVENT_SQ_DRAINED:
	case IBV_EVENT_PATH_MIG:
	case IBV_EVENT_PATH_MIG_ERR:
	case IBV_EVENT_QP_LAST_WQE_REACHED:
		out->qp = event.element.qp;
		break;
	case IBV_EVENT_CQ_ERR:
		out->cq = event.element.cq;
		break;
	case IBV_EVENT_PORT_ACTIVE:
	case IBV_EVENT_PORT_ERR:
		out->port = event.element.port_num;
		break;
	default:
		break;
	}
	ibv_ack_async_event(&event);
	return 0;
}

static struct rdma_conn_param conn_param(const struct conn *conn)
{
	return (struct rdma_conn_param){
		.private_data = conn->private_data,
		.private_data_len = conn->private_len,
		.responder_resources = conn->responder_resources,
		.initiator_depth = conn->initiator_depth,
		.flow_control = conn->flow_control,
		.retry_count = conn->retry_count,
		.rnr_retry_count = conn->rnr_retry_count,
	};
}

int cm_connect(struct rdma_cm_id *id, const struct conn *conn)
{
	struct rdma_conn_param param = conn_param(conn);

	return rdma_connect(id, &param) ? errno : 0;
}

int cm_accept(struct rdma_cm_id *id, const struct conn *conn)
{
	struct rdma_conn_param param = conn_param(conn);

	return rdma_accept(id, &param) ? errno : 0;
}

// ibv_reg_mr is a macro in the library's header.
struct ibv_mr *reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
	return ibv_reg_mr(pd, addr, length, access);
}

// hold_device returns one more ID on the same device, bound to the same address. It returns NULL
// if the address now belongs to another device.
struct rdma_cm_id *hold_device(struct rdma_cm_id *id, struct rdma_event_channel *channel)
{
	struct sockaddr_storage addr = id->route.addr.src_storage;
	struct rdma_cm_id *hold;

	if (addr.ss_family == AF_INET6)
		((struct sockaddr_in6 *)&addr)->sin6_port = 0;
	else
		((struct sockaddr_in *)&addr)->sin_port = 0;
	if (rdma_create_id(channel, &hold, NULL, RDMA_PS_TCP))
		return NULL;
	if (rdma_bind_addr(hold, (struct sockaddr *)&addr) || hold->verbs != id->verbs) {
		rdma_destroy_id(hold);
		return NULL;
	}
	return hold;
}

// A driver that cannot detach from its users waits until the context of a removed device is
// closed. librdmacm, to which the context belongs, closes it only when it meets another device
// that it does not know, which may never happen. rdma_get_devices would make it look for removed
// devices, but also open all others. So detach_device ends what the kernel has of the context:
// /dev/null takes the place of its descriptors until librdmacm closes them.
void detach_device(struct ibv_context *context)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (null < 0)
		return;
	dup3(null, context->cmd_fd, O_CLOEXEC);
	dup3(null, context->async_fd, O_CLOEXEC);
	close(null);
}
