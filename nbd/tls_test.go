package nbd

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ublk-nvmeof/block"
)

// authority issues certificates whose keys are of one type.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  crypto.Signer
	make func() (crypto.Signer, error)
}

var keyTypes = map[string]func() (crypto.Signer, error){
	"RSA":     func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) },
	"ECDSA":   func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) },
	"Ed25519": func() (crypto.Signer, error) { _, key, err := ed25519.GenerateKey(rand.Reader); return key, err },
}

func newAuthority(t testing.TB, keys string) *authority {
	t.Helper()
	a := &authority{t: t, make: keyTypes[keys]}
	a.cert, a.key = a.issue("authority of "+keys, true)
	return a
}

func (a *authority) issue(name string, ca bool) (*x509.Certificate, crypto.Signer) {
	a.t.Helper()
	key := must(a.make())
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true, IsCA: ca,
	}
	if ca {
		template.KeyUsage = x509.KeyUsageCertSign
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der := must(x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer))
	return must(x509.ParseCertificate(der)), key
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

func (a *authority) pair(name string) tls.Certificate {
	cert, key := a.issue(name, false)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// dir has the files that a client program looks for. Without a pair it has no
// certificate.
func (a *authority) dir(pair *tls.Certificate) string {
	a.t.Helper()
	dir := a.t.TempDir()
	write := func(name, kind string, der []byte) {
		text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	write("ca-cert.pem", "CERTIFICATE", a.cert.Raw)
	if pair != nil {
		write("client-cert.pem", "CERTIFICATE", pair.Certificate[0])
		write("client-key.pem", "PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(pair.PrivateKey)))
	}
	return dir
}

// TestTLSClients makes clients of two libraries present certificates with all types of
// keys, in both versions of TLS, and wrong certificates or none.
func TestTLSClients(t *testing.T) {
	for keys := range keyTypes {
		a, other := newAuthority(t, keys), newAuthority(t, keys)
		pair, wrong := a.pair("client"), other.pair("stranger")
		// The authority of the certificate is checked, too, not only its
		// presence.
		right, strange, none := a.dir(&pair), a.dir(&wrong), a.dir(nil)
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(keys+"/"+tls.VersionName(version), func(t *testing.T) {
				s, path := newServer(t, Config{
					Exports: []Export{{Name: "1", Device: newRAM(t, block.Geometry{Sectors: 4096})}}, RequireTLS: true,
					TLS: &tls.Config{
						Certificates: []tls.Certificate{a.pair("server")}, ClientCAs: a.pool(), ClientAuth: tls.RequireAndVerifyClientCert,
						MinVersion: version, MaxVersion: version,
					},
				})
				l, err := net.Listen("tcp", "localhost:0")
				if err != nil {
					t.Fatal(err)
				}
				go func() { _ = s.Serve(l) }() // Stop ends it
				port := l.Addr().(*net.TCPAddr).Port
				uri := fmt.Sprintf("nbds://localhost:%d/1?tls-certificates=", port)
				image := func(dir string) []string {
					return []string{"info", "--object", "tls-creds-x509,id=t,endpoint=client,dir=" + dir, "--image-opts", fmt.Sprintf("driver=nbd,host=localhost,port=%d,export=1,tls-creds=t", port)}
				}
				if out := run(t, "nbdinfo", "--size", uri+right); strings.TrimSpace(out) != "2097152" {
					t.Error(out)
				}
				file, data := randomFile(t, 1<<20)
				run(t, "nbdcopy", file, uri+right)
				back := filepath.Join(t.TempDir(), "back")
				run(t, "nbdcopy", uri+right, back)
				if got, err := os.ReadFile(back); err != nil || len(got) != 2<<20 || !bytes.Equal(got[:1<<20], data) {
					t.Errorf("%d bytes came back, %v, and they differ", len(got), err)
				}
				run(t, "qemu-img", image(right)...)
				for _, dir := range []string{strange, none} {
					refused(t, "nbdinfo", "--size", uri+dir)
					refused(t, "qemu-img", image(dir)...)
				}
				config := &tls.Config{RootCAs: a.pool(), ServerName: "localhost", Certificates: []tls.Certificate{pair}, ClientSessionCache: tls.NewLRUClientSessionCache(4)}
				for range 2 { // the second time, the session may be resumed
					c := secure(t, path, config)
					c.option(optGo, infoData("1"))
					if n := c.answers(optGo); n[len(n)-1].rep != repAck {
						t.Errorf("%+v", n)
					}
					exchangeSmall(t, c)
				}
				for _, certs := range [][]tls.Certificate{nil, {wrong}} {
					c := secure(t, path, &tls.Config{RootCAs: a.pool(), ServerName: "localhost", Certificates: certs})
					_, _ = c.Write(append(append([]byte("IHAVEOPT"), be(uint32(optList))...), 0, 0, 0, 0)) // it may have hung up
					c.closed()
				}
			})
		}
	}
}

// refused runs a client program, which must fail, but not because of a timeout.
func refused(t testing.TB, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(testContext(t), 30*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, tool(t, name), args...).CombinedOutput(); err == nil || ctx.Err() != nil {
		t.Errorf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// TestVerifyConnection checks that the requirements of an embedder's configuration are
// kept.
func TestVerifyConnection(t *testing.T) {
	a := newAuthority(t, "ECDSA")
	pair := a.pair("client")
	var chains [][]*x509.Certificate
	config := &tls.Config{
		Certificates: []tls.Certificate{a.pair("server")}, ClientCAs: a.pool(), ClientAuth: tls.VerifyClientCertIfGiven,
		VerifyConnection: func(s tls.ConnectionState) error {
			chains = s.VerifiedChains
			if len(s.PeerCertificates) > 0 && s.PeerCertificates[0].Subject.CommonName == "client" {
				return nil
			}
			return fmt.Errorf("who is that")
		},
	}
	for name, config := range map[string]*tls.Config{
		"direct": config, "by client": {GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return config, nil }},
	} {
		t.Run(name, func(t *testing.T) {
			chains = nil
			_, path := newServer(t, Config{Exports: twoExports(t), TLS: config})
			c := secure(t, path, &tls.Config{RootCAs: a.pool(), ServerName: "localhost", Certificates: []tls.Certificate{pair}})
			c.option(optInfo, infoData("first"))
			c.answers(optInfo)
			if len(chains) != 1 || len(chains[0]) != 2 {
				t.Errorf("%d chains", len(chains))
			}
			for _, certs := range [][]tls.Certificate{nil, {newAuthority(t, "ECDSA").pair("client")}} {
				c := secure(t, path, &tls.Config{RootCAs: a.pool(), ServerName: "localhost", Certificates: certs})
				_, _ = c.Write(make([]byte, 16))
				c.closed()
			}
		})
	}
}
