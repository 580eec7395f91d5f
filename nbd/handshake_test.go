package nbd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/block"
)

// twoExports returns a writable export with all features of a device, and a read-only
// one.
func twoExports(t testing.TB) []Export {
	return []Export{
		{Name: "first", Description: "a disk", Device: newRAM(t, block.Geometry{Sectors: 4096, VolatileCache: true})},
		{Name: "second", Device: newRAM(t, block.Geometry{Sectors: 64, LogicalBlock: 4096}), ReadOnly: true},
	}
}

const allFlags = flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendZeroes | flagCanMultiConn

func exportInfo(size uint64, flags uint16) string {
	return string(bytes.Join([][]byte{be(infoExport), be(size), be(flags)}, nil))
}

func blockInfo(sizes ...uint32) string { return string(append(be(infoBlockSize), be(sizes)...)) }

// TestOptions sends one option after the other on one connection. No option may end it.
func TestOptions(t *testing.T) {
	_, path := newServer(t, Config{Exports: twoExports(t), Depth: 16, MaxIO: 64 << 10})
	c := dial(t, path)
	c.hello()
	first := []answer{{repInfo, exportInfo(2<<20, allFlags)}, {repInfo, blockInfo(512, 4096, 1<<20)}}
	for _, tt := range []struct {
		name string
		opt  option
		data []byte
		want []answer
	}{
		{"list", optList, nil, []answer{{repServer, "\x00\x00\x00\x05firsta disk"}, {repServer, "\x00\x00\x00\x06second"}, {repAck, ""}}},
		{"list with data", optList, []byte("x"), []answer{{repErrInvalid, "the option takes no data"}}},
		{"info", optInfo, infoData("first"), append(slices.Clone(first), answer{repAck, ""})},
		{"info of the default", optInfo, infoData("", infoName, infoBlockSize), append(slices.Clone(first), answer{repInfo, "\x00\x01first"}, answer{repAck, ""})},
		{"description", optInfo, infoData("first", infoDescription, 99), append(slices.Clone(first), answer{repInfo, "\x00\x02a disk"}, answer{repAck, ""})},
		{"read-only", optInfo, infoData("second"), []answer{
			{repInfo, exportInfo(32<<10, allFlags|flagReadOnly)}, {repInfo, blockInfo(4096, 4096, 1<<20)}, {repAck, ""},
		}},
		{"unknown export", optInfo, infoData("third"), []answer{{repErrUnknown, "no such export"}}},
		{"go to an unknown export", optGo, infoData("third"), []answer{{repErrUnknown, "no such export"}}},
		{"empty info", optInfo, nil, []answer{{repErrInvalid, "the request is malformed"}}},
		{"name beyond the data", optInfo, append(be(uint32(6)), "first\x00"...), []answer{{repErrInvalid, "the request is malformed"}}},
		{"name of 4 GiB", optGo, append(be(^uint32(0)), "first\x00\x00"...), []answer{{repErrInvalid, "the request is malformed"}}},
		{"too few infos", optGo, append(infoData("first")[:9], 0, 2, 0, 1), []answer{{repErrInvalid, "the request is malformed"}}},
		{"rest", optGo, append(infoData("first"), 0), []answer{{repErrInvalid, "the request is malformed"}}},
		{"TLS", optStartTLS, nil, []answer{{repErrPolicy, "this server has no TLS"}}},
		{"TLS with data", optStartTLS, []byte("x"), []answer{{repErrInvalid, "the option takes no data"}}},
		{"meta contexts", 10, []byte("whatever"), []answer{{repErrUnsup, "the option is not supported"}}},
		{"unknown", 1 << 30, []byte("whatever"), []answer{{repErrUnsup, "the option is not supported"}}},
		{"too big", optInfo, make([]byte, maxOptionData+1), []answer{{repErrTooBig, ""}}},
		{"structured with data", optStructuredReply, []byte("x"), []answer{{repErrInvalid, "the option takes no data"}}},
		{"structured", optStructuredReply, nil, []answer{{repAck, ""}}},
		{"structured again", optStructuredReply, nil, []answer{{repAck, ""}}},
		{"info of structured", optInfo, infoData("first"), []answer{
			{repInfo, exportInfo(2<<20, allFlags|flagSendDF)}, {repInfo, blockInfo(512, 4096, 1<<20)}, {repAck, ""},
		}},
		{"abort", optAbort, nil, []answer{{repAck, ""}}},
	} {
		c.option(tt.opt, tt.data)
		if got := c.answers(tt.opt); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
	c.closed()
}

// TestExportName chooses an export with the old option, with and without the zeroes.
func TestExportName(t *testing.T) {
	_, path := newServer(t, Config{Exports: twoExports(t)})
	for _, flags := range []uint32{0, 1, 2, 3} {
		c := dial(t, path)
		c.read(18)
		c.send(be(flags))
		c.option(optExportName, []byte("first"))
		want := append(be(uint64(2<<20)), be(uint16(allFlags))...)
		if flags&handshakeNoZeroes == 0 {
			want = append(want, make([]byte, 124)...)
		}
		if got := c.read(len(want)); !bytes.Equal(got, want) {
			t.Errorf("flags %d: %x", flags, got)
		}
		c.ask(request{kind: cmdFlush, cookie: 5}, nil)
		if e := c.simple(5); e != 0 {
			t.Errorf("flags %d: flush: %d", flags, e)
		}
	}
}

// TestBadHandshake checks the messages that end a connection at once.
func TestBadHandshake(t *testing.T) {
	_, path := newServer(t, Config{Exports: twoExports(t), HandshakeTimeout: 5 * time.Second})
	opt := func(o option, length uint32) []byte {
		return append(append([]byte("IHAVEOPT"), be(uint32(o))...), be(length)...)
	}
	for name, b := range map[string][]byte{
		"flags":           be(uint32(4)),
		"magic":           append(be(uint32(3)), "IHAVEOPS00000000"...),
		"no such export":  append(append(be(uint32(3)), opt(optExportName, 5)...), "third"...),
		"option of 4 GiB": append(be(uint32(3)), opt(optInfo, ^uint32(0))...),
		"name of 1 MiB":   append(be(uint32(3)), opt(optExportName, 1<<20)...),
		"not fixed":       append(be(uint32(0)), opt(optList, 0)...),
		"HTTP":            []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, path)
			_, _ = c.Write(b) // it may hang up before the end
			if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
				t.Error(err)
			}
		})
	}
	t.Run("nothing", func(t *testing.T) {
		_ = dial(t, path).Close()
	})
	t.Run("half an option", func(t *testing.T) {
		c := dial(t, path)
		c.hello()
		c.send(opt(optInfo, 100))
		_ = c.Close()
	})
}

// TestSilentClient checks that the server does not wait forever.
func TestSilentClient(t *testing.T) {
	_, path := newServer(t, Config{Exports: twoExports(t), HandshakeTimeout: time.Millisecond})
	c := dial(t, path)
	c.read(18)
	c.closed()
}

// testTLS returns a configuration for a server, and one for its clients.
func testTLS(t testing.TB) (server, peer *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"nbd.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: pool, ServerName: "nbd.test"}
}

func TestTLS(t *testing.T) {
	server, peer := testTLS(t)
	_, path := newServer(t, Config{Exports: twoExports(t), TLS: server, RequireTLS: true})
	c := dial(t, path)
	c.hello()
	for _, opt := range []option{optList, optInfo, optGo, optStructuredReply, 999} {
		c.option(opt, nil)
		if a := c.answers(opt); a[0].rep != repErrTLSReqd {
			t.Errorf("option %d without TLS: %+v", opt, a)
		}
	}
	c.option(optStartTLS, nil)
	if a := c.answers(optStartTLS); a[0].rep != repAck {
		t.Fatalf("%+v", a)
	}
	c.Conn = tls.Client(c.Conn, peer)
	c.option(optStartTLS, nil)
	if a := c.answers(optStartTLS); a[0].rep != repErrInvalid {
		t.Errorf("TLS in TLS: %+v", a)
	}
	c.option(optGo, infoData("first"))
	if a := c.answers(optGo); a[len(a)-1].rep != repAck {
		t.Fatalf("%+v", a)
	}
	data := bytes.Repeat([]byte("secret! "), 32<<10)
	c.ask(request{kind: cmdWrite, cookie: 1, length: uint32(len(data))}, data)
	if e := c.simple(1); e != 0 {
		t.Errorf("write: %d", e)
	}
	c.ask(request{kind: cmdRead, cookie: 2, length: uint32(len(data))}, nil)
	if e := c.simple(2); e != 0 || !bytes.Equal(c.read(len(data)), data) {
		t.Errorf("read: %d, or other data", e)
	}
	c.ask(request{kind: cmdDisc}, nil)
	c.closed()

	c = dial(t, path)
	c.hello()
	c.option(optExportName, []byte("first"))
	c.closed()
}

// FuzzHandshake makes a client send anything after the greeting. The connection always
// ends, because the client disconnects.
func FuzzHandshake(f *testing.F) {
	opt := func(o option, data []byte) []byte {
		return bytes.Join([][]byte{[]byte("IHAVEOPT"), be(uint32(o)), be(uint32(len(data))), data}, nil)
	}
	hello := be(uint32(3))
	f.Add(slices.Concat(hello, opt(optList, nil), opt(optAbort, nil)))
	f.Add(slices.Concat(hello, opt(optStructuredReply, nil), opt(optInfo, infoData("first", 1, 2, 3)), opt(optGo, infoData("first"))))
	f.Add(slices.Concat(be(uint32(0)), opt(optExportName, []byte("second"))))
	f.Add(slices.Concat(hello, opt(optStartTLS, nil), opt(4, nil)))
	s := &Server{}
	for _, e := range twoExports(f) {
		s.exports = append(s.exports, &export{Export: e, block: e.Device.Geometry().LogicalBlock})
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		n := &negotiation{srv: s, conn: &script{in: bytes.NewReader(in)}, secured: func() {}, chosen: func() error { return nil }}
		o, err := n.run()
		if err == nil && (o.export == nil || o.size == 0) {
			t.Errorf("chose %+v", o)
		}
		out := n.conn.(*script).out.Bytes()
		if len(out) < 18 {
			t.Fatalf("%d bytes of greeting", len(out))
		}
		for out = out[18:]; len(out) >= 20 && binary.BigEndian.Uint64(out) == magicOptionReply; {
			length := binary.BigEndian.Uint32(out[16:])
			if uint64(len(out)) < 20+uint64(length) {
				t.Fatalf("reply of %d bytes, %d are there", length, len(out)-20)
			}
			out = out[20+length:]
		}
		if len(out) > 0 && (err != nil || len(out) != 10 && len(out) != 134) {
			t.Errorf("%d bytes that are no reply", len(out))
		}
	})
}

// script is a connection to a client that sends prepared bytes.
type script struct {
	net.Conn
	in  *bytes.Reader
	out bytes.Buffer
}

func (s *script) Read(b []byte) (int, error)  { return s.in.Read(b) }
func (s *script) Write(b []byte) (int, error) { return s.out.Write(b) }
