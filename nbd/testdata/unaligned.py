# A client that does not ask for block sizes, on an export of blocks of 4096 bytes. The
# socket's path is in SOCKET.
import os

import nbd

h = nbd.NBD()
h.set_request_block_size(False)
h.set_strict_mode(0)
h.connect_unix(os.environ["SOCKET"])
want = bytearray(os.urandom(65536))
h.pwrite(bytes(want), 0)
for offset, length in (512, 512), (1, 1), (4095, 2), (100, 9000), (8192, 4096), (12287, 20000):
    data = os.urandom(length)
    h.pwrite(data, offset)
    want[offset : offset + length] = data
    assert h.pread(length, offset) == data, (offset, length)
    zeroes = (length + 1) // 2
    h.zero(zeroes, offset)
    want[offset : offset + zeroes] = bytes(zeroes)
assert h.pread(65536, 0) == want
h.shutdown()
