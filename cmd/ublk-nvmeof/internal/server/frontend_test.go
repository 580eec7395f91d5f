package server

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/cmd/ublk-nvmeof/internal/exit"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/options"
	"ublk-nvmeof/cmd/ublk-nvmeof/internal/state"
	"ublk-nvmeof/nbd"
	"ublk-nvmeof/ublk"
)

func TestChooseFront(t *testing.T) {
	for _, tt := range []struct {
		name       string
		want       string // of the operator
		ublk, nbd  error
		chosen     string
		code       exit.Code
		leftByNBD  bool
		numberOnly bool
	}{
		{name: "all there", want: options.Auto, chosen: options.Ublk},
		{name: "no ublk", want: options.Auto, ublk: ublk.ErrNoDriver, chosen: options.NBD},
		{name: "neither", want: options.Auto, ublk: ublk.ErrNoDriver, nbd: nbd.ErrNoDriver, chosen: options.NBDSocket},
		{name: "no rights for NBD", want: options.Auto, ublk: ublk.ErrNoDriver, nbd: nbd.ErrPermission, chosen: options.NBDSocket},
		{name: "no rights for ublk", want: options.Auto, ublk: ublk.ErrPermission, nbd: nbd.ErrNoDriver, chosen: options.NBDSocket},
		{name: "no rights for both", want: options.Auto, ublk: ublk.ErrPermission, nbd: nbd.ErrPermission, chosen: options.NBDSocket},
		{name: "rights for NBD only", want: options.Auto, ublk: ublk.ErrPermission, chosen: options.NBD},
		{name: "no rights for the number", want: options.Auto, ublk: ublk.ErrPermission, numberOnly: true, chosen: options.Ublk, code: exit.Permission},
		{name: "no rights for what is asked", want: options.Ublk, ublk: ublk.ErrPermission, chosen: options.Ublk, code: exit.Permission},
		{name: "ublk is broken", want: options.Auto, ublk: errors.New("broken"), chosen: options.Ublk, code: exit.Other},
		{name: "a number is wanted", want: options.Auto, ublk: ublk.ErrNoDriver, numberOnly: true, chosen: options.Ublk, code: exit.NoUblk},
		{name: "ublk", want: options.Ublk, ublk: ublk.ErrNoDriver, chosen: options.Ublk, code: exit.NoUblk},
		{name: "nbd", want: options.NBD, chosen: options.NBD},
		{name: "nbd, not there", want: options.NBD, nbd: nbd.ErrNoDriver, chosen: options.NBD, code: exit.NoUblk},
		{name: "socket", want: options.NBDSocket, chosen: options.NBDSocket},
		{name: "left by a dead server", want: options.Auto, leftByNBD: true, code: exit.Other},
	} {
		w, o := newWorld(), lab()
		w.ublkErr, w.nbdErr, o.Frontend = tt.ublk, tt.nbd, tt.want
		if tt.numberOnly {
			o.Device = 3
		}
		s := &server{opts: o, back: w.backend(), log: slog.New(slog.NewTextHandler(t.Output(), nil))}
		if w.nbdLeft = tt.leftByNBD; w.nbdLeft {
			s.waiting = []state.Device{{Kind: state.NBD, ID: 1}}
		}
		got, err := s.chooseFront()
		if got.name != tt.chosen || exit.Of(err) != tt.code || err == nil && got.reason == "" {
			t.Errorf("%s: %+v, %v", tt.name, got, err)
		}
	}
}

// TestNBDSocket serves two namespaces on a socket, and leaves nothing.
// certify writes the files of --nbd-tls, and gives what a client needs that has the
// same certificate.
func certify(t *testing.T, dir string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"nbd.test"},
		IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"server-cert.pem": {Type: "CERTIFICATE", Bytes: cert},
		"ca-cert.pem":     {Type: "CERTIFICATE", Bytes: cert},
		"server-key.pem":  {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
	return &tls.Config{RootCAs: pool, ServerName: "nbd.test", Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}}
}

// dialTLS asks the server for TLS, and then for the list of exports.
func dialTLS(socket string, config *tls.Config) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	answer := make([]byte, 20)
	if _, err := io.ReadFull(c, answer[:18]); err != nil {
		return err
	}
	if _, err := c.Write([]byte("\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x05\x00\x00\x00\x00")); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	secure := tls.Client(c, config)
	// A server that refuses may have closed already; it is the answer that says why.
	_, _ = secure.Write([]byte("IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00"))
	_, err = io.ReadFull(secure, answer)
	return err
}

func TestNBDSocketTLS(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	o.Frontend, o.Socket, o.TLS = options.NBDSocket, filepath.Join(dir, "tls.sock"), t.TempDir()
	peer := certify(t, o.TLS)
	r := begin(t, w, o, dir)
	if s := r.waitReady(); s.Devices[0].Path() != "nbds+unix:///1?socket="+o.Socket {
		t.Errorf("%+v", s)
	}
	if err := dialTLS(o.Socket, peer); err != nil {
		t.Errorf("with a certificate: %v", err)
	}
	peer.Certificates = nil
	if err := dialTLS(o.Socket, peer); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without a certificate: %v", err)
	}
	if err := r.client().Disconnect(t.Context(), true); err != nil {
		t.Errorf("by force: %v", err)
	}
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	if err := os.Remove(o.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket: %v", err)
	}
	leaves(t, dir)
}

func TestNBDSocket(t *testing.T) {
	w, o, dir := newWorld(), lab(), runDir(t)
	w.nsids, o.Frontend = []uint32{1, 7}, options.NBDSocket
	r := begin(t, w, o, dir)
	s := r.waitReady()
	path := filepath.Join(dir, "nbd-23e2becd5a5238d9.sock")
	if len(s.Devices) != 2 || s.Devices[1].Path() != "nbd+unix:///7?socket="+path || s.Frontend != options.NBDSocket || s.FrontendReason != "asked for" {
		t.Errorf("%+v", s)
	}
	records, err := state.Dir(dir).List()
	if err != nil || len(records) != 1 || len(records[0].Devices) != 2 || records[0].Devices[0].Path() != s.Devices[0].Path() {
		t.Errorf("on record: %+v, %v", records, err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	// The old way to choose an export: no options before it.
	hello := make([]byte, 18)
	if _, err := io.ReadFull(c, hello); err != nil || !bytes.HasPrefix(hello, []byte("NBDMAGICIHAVEOPT")) {
		t.Fatalf("%q, %v", hello, err)
	}
	if _, err := c.Write([]byte("\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x017")); err != nil {
		t.Fatal(err)
	}
	info := make([]byte, 10)
	if _, err := io.ReadFull(c, info); err != nil || !bytes.HasPrefix(info, []byte("\x00\x00\x00\x00\x00\x70\x00\x00")) {
		t.Fatalf("%x, %v", info, err)
	}
	// A flush, so that it is sure that the client counts.
	if _, err := c.Write(append([]byte{0x25, 0x60, 0x95, 0x13, 0, 0, 0, 3}, make([]byte, 20)...)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	if err := r.client().Disconnect(t.Context(), false); exit.Of(err) != exit.Busy {
		t.Errorf("disconnect with a client: %v", err)
	}
	if err := r.client().HandOver(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "nbd-socket") {
		t.Errorf("hand over: %v", err)
	}
	if err := r.client().Disconnect(t.Context(), true); err != nil {
		t.Errorf("by force: %v", err)
	}
	if err := <-r.result; err != nil {
		t.Error(err)
	}
	if _, err := c.Read(info); !errors.Is(err, io.EOF) {
		t.Errorf("the client heard %v", err)
	}
	leaves(t, dir)
}
