# What libnbd can ask of a server. The socket's path is in SOCKET.
import errno
import os

import nbd

path = os.environ["SOCKET"]
h = nbd.NBD()


def fails(number, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as e:
        assert e.errnum == number, (call, e)
        return
    assert False, (call, args)


# The negotiation, step by step.
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_unix(path)
assert h.aio_is_negotiating()
names = []
h.opt_list(lambda name, description: names.append((name, description)))
assert names == [("first", "a disk"), ("second", "")], names
h.set_export_name("third")
fails(errno.ENOENT, h.opt_info)
h.set_export_name("second")
h.opt_info()
assert h.is_read_only() and h.get_size() == 32768
assert h.get_block_size(nbd.SIZE_MINIMUM) == 4096
h.set_export_name("")
h.opt_info()
assert h.get_canonical_export_name() == "first"
assert h.get_export_description() == "a disk"
h.set_export_name("first")
h.opt_go()
assert h.aio_is_ready()

# The transmission phase.
assert h.get_protocol() == "newstyle-fixed"
assert h.get_structured_replies_negotiated()
assert h.can_fua() and h.can_flush() and h.can_trim() and h.can_zero() and h.can_df() and h.can_multi_conn()
assert not h.can_cache() and not h.can_fast_zero() and not h.is_read_only() and not h.is_rotational()
data = bytes(range(256)) * 256
h.pwrite(data, 512, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(len(data), 512) == data
chunks = []
h.pread_structured(len(data), 512, lambda b, offset, status, err: chunks.append((len(b), offset, status)))
h.pread_structured(512, 1024, lambda b, offset, status, err: chunks.append((len(b), offset, status)), nbd.CMD_FLAG_DF)
assert chunks == [(len(data), 512, nbd.READ_DATA), (512, 1024, nbd.READ_DATA)], chunks
h.trim(4096, 512)
assert h.pread(4096, 512) == bytes(4096)
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 8192) == bytes(4096)

# What libnbd would refuse itself.
h.set_strict_mode(0)
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.ENOSPC, h.pwrite, bytes(512), size)
fails(errno.ENOSPC, h.zero, 1024, size - 512)
fails(errno.EINVAL, h.trim, 1024, size - 512)
fails(errno.EINVAL, h.pread, 512, 1)
fails(errno.EINVAL, h.pread, 32 << 20, 0)
fails(errno.EINVAL, h.cache, 512, 0)
fails(errno.EINVAL, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(512, 16384) == data[15872:16384]
h.shutdown()

# Options that end it, and clients that know less.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
h.opt_abort()
h = nbd.NBD()
h.set_request_structured_replies(False)
h.set_handshake_flags(0)
h.set_export_name("second")
h.connect_unix(path)
assert h.get_protocol() == "newstyle" and not h.get_structured_replies_negotiated()
assert h.pread(4096, 0) == bytes(4096)
h.set_strict_mode(0)
fails(errno.EPERM, h.pwrite, bytes(4096), 0)
h.shutdown()
