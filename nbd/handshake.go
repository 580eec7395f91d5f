package nbd

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
)

// Limits of the memory of a negotiation. Config.HandshakeTimeout limits its time, and
// thereby the number of options.
const (
	maxOptionData = 4 + maxName + 2 + 2*math.MaxUint16 // length of the longest well-formed INFO
	maxTooBig     = 1 << 20                            // longer data ends the negotiation; shorter data is skipped and the option refused
)

var (
	errAborted = errors.New("client ended the negotiation")
	errNoTLS   = errors.New("client does not use TLS, which this server requires")
)

// negotiation is a connection before the transmission phase.
type negotiation struct {
	srv        *Server
	conn       net.Conn     // *tls.Conn after STARTTLS
	secured    func()       // called when TLS is established
	chosen     func() error // called before an export is granted; an error refuses it
	noZeroes   bool
	fixed      bool
	structured bool
	data       []byte
	refused    error // the last refusal of something that the client needs, for the log
}

// run negotiates until the client has chosen an export. Then n.conn is the connection for
// the transmission phase, which is a *tls.Conn if the client has asked for TLS.
func (n *negotiation) run() (offer, error) {
	hello := binary.BigEndian.AppendUint64(nil, magicHello)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, handshakeKnown)
	if _, err := n.conn.Write(hello); err != nil {
		return offer{}, err
	}
	var word [4]byte
	if _, err := io.ReadFull(n.conn, word[:]); err != nil {
		return offer{}, fmt.Errorf("read client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(word[:])
	if flags&^handshakeKnown != 0 {
		return offer{}, fmt.Errorf("client flags %#x are unknown", flags)
	}
	n.fixed, n.noZeroes = flags&handshakeFixed != 0, flags&handshakeNoZeroes != 0
	for {
		opt, err := n.readOption()
		if err != nil {
			return offer{}, err
		}
		o, chosen, err := n.do(opt)
		if err != nil || chosen {
			return o, err
		}
	}
}

// errTooBig means that an option has too much data.
var errTooBig = errors.New("option data is too long")

// readOption reads an option, and its data into n.data. If the data is longer than
// maxOptionData, n.data is nil.
func (n *negotiation) readOption() (option, error) {
	var head [16]byte
	if _, err := io.ReadFull(n.conn, head[:]); err != nil {
		return 0, fmt.Errorf("read option: %w", err)
	}
	if binary.BigEndian.Uint64(head[:]) != magicOption {
		return 0, errors.New("option has a wrong magic number")
	}
	opt, length := option(binary.BigEndian.Uint32(head[8:])), binary.BigEndian.Uint32(head[12:])
	switch {
	case length > maxTooBig, length > maxOptionData && opt == optExportName:
		return opt, fmt.Errorf("option %d: %w", opt, errTooBig)
	case length > maxOptionData:
		n.data = nil
		_, err := io.CopyN(io.Discard, n.conn, int64(length))
		return opt, err
	}
	n.data = make([]byte, length)
	if _, err := io.ReadFull(n.conn, n.data); err != nil {
		return opt, fmt.Errorf("read data of option %d: %w", opt, err)
	}
	return opt, nil
}

// do executes an option. chosen reports whether the transmission phase follows.
func (n *negotiation) do(opt option) (o offer, chosen bool, err error) {
	if !n.fixed && opt != optExportName {
		return o, false, fmt.Errorf("option %d of a client that is not fixed newstyle", opt)
	}
	_, secure := n.conn.(*tls.Conn)
	switch {
	case n.data == nil:
		return o, false, n.reply(opt, repErrTooBig, nil)
	case opt == optAbort:
		_ = n.reply(opt, repAck, nil) // the client may be gone
		return o, false, errAborted
	case opt == optStartTLS:
		return o, false, n.startTLS(secure)
	case n.srv.cfg.RequireTLS && !secure && opt == optExportName:
		return o, false, errNoTLS
	case n.srv.cfg.RequireTLS && !secure:
		return o, false, n.refuse(opt, repErrTLSReqd, "this server requires TLS")
	}
	switch opt {
	case optExportName:
		o, err = n.exportName()
		return o, err == nil, err
	case optGo, optInfo:
		o, chosen, err = n.info(opt)
		return o, chosen && opt == optGo, err
	case optList:
		return o, false, n.list()
	case optStructuredReply:
		if len(n.data) > 0 {
			return o, false, n.refuse(opt, repErrInvalid, "the option takes no data")
		}
		n.structured = true
		return o, false, n.reply(opt, repAck, nil)
	}
	return o, false, n.refuse(opt, repErrUnsup, "the option is not supported")
}

// exportName executes EXPORT_NAME. The server can refuse it only by closing the
// connection.
func (n *negotiation) exportName() (offer, error) {
	e := n.srv.find(string(n.data))
	if e == nil {
		return offer{}, fmt.Errorf("no export %q", n.data)
	}
	if err := n.chosen(); err != nil {
		return offer{}, err
	}
	o := e.offer(n.structured)
	b := binary.BigEndian.AppendUint64(nil, o.size)
	b = binary.BigEndian.AppendUint16(b, o.flags)
	if !n.noZeroes {
		b = append(b, make([]byte, 124)...)
	}
	_, err := n.conn.Write(b)
	return o, err
}

// info executes INFO and GO. found reports whether the export was granted.
func (n *negotiation) info(opt option) (o offer, found bool, err error) {
	name, about, ok := parseInfo(n.data)
	if !ok {
		return o, false, n.refuse(opt, repErrInvalid, "the request is malformed")
	}
	e := n.srv.find(name)
	if e == nil {
		return o, false, n.refuse(opt, repErrUnknown, "no such export")
	}
	if opt == optGo {
		if err := n.chosen(); err != nil {
			return o, false, n.refuse(opt, repErrPolicy, err.Error())
		}
	}
	o = e.offer(n.structured)
	o.aligned = about.blockSize
	be := binary.BigEndian
	export := be.AppendUint16(nil, uint16(infoExport))
	export = be.AppendUint64(export, o.size)
	export = be.AppendUint16(export, o.flags)
	sizes := be.AppendUint16(nil, uint16(infoBlockSize))
	sizes = be.AppendUint32(sizes, o.minBlock)
	sizes = be.AppendUint32(sizes, o.preferred)
	sizes = be.AppendUint32(sizes, o.maxRequest)
	infos := [][]byte{export, sizes}
	if about.name {
		infos = append(infos, append(be.AppendUint16(nil, uint16(infoName)), e.Name...))
	}
	if about.description {
		infos = append(infos, append(be.AppendUint16(nil, uint16(infoDescription)), e.Description...))
	}
	for _, info := range infos {
		if err := n.reply(opt, repInfo, info); err != nil {
			return o, false, err
		}
	}
	return o, true, n.reply(opt, repAck, nil)
}

// asked holds the information that a client has asked for.
type asked struct{ name, description, blockSize bool }

// parseInfo decodes the data of INFO and GO: a name and a list of information types.
func parseInfo(data []byte) (name string, about asked, ok bool) {
	be := binary.BigEndian
	if len(data) < 4 {
		return "", about, false
	}
	length := be.Uint32(data)
	data = data[4:]
	if length > maxName || uint64(len(data)) < uint64(length)+2 {
		return "", about, false
	}
	name, data = string(data[:length]), data[length:]
	count := int(be.Uint16(data))
	data = data[2:]
	if len(data) != 2*count {
		return "", about, false
	}
	for ; len(data) > 0; data = data[2:] {
		switch infoType(be.Uint16(data)) {
		case infoName:
			about.name = true
		case infoDescription:
			about.description = true
		case infoBlockSize:
			about.blockSize = true
		}
	}
	return name, about, true
}

func (n *negotiation) list() error {
	if len(n.data) > 0 {
		return n.refuse(optList, repErrInvalid, "the option takes no data")
	}
	for _, e := range n.srv.list() {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		b = append(append(b, e.Name...), e.Description...)
		if err := n.reply(optList, repServer, b); err != nil {
			return err
		}
	}
	return n.reply(optList, repAck, nil)
}

// startTLS executes STARTTLS. It discards the results of earlier options.
func (n *negotiation) startTLS(secure bool) error {
	switch {
	case len(n.data) > 0:
		return n.refuse(optStartTLS, repErrInvalid, "the option takes no data")
	case secure:
		return n.refuse(optStartTLS, repErrInvalid, "TLS is in use")
	case n.srv.cfg.TLS == nil:
		return n.refuse(optStartTLS, repErrPolicy, "this server has no TLS")
	}
	if err := n.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	conn := tls.Server(n.conn, n.srv.cfg.TLS)
	if err := conn.Handshake(); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	n.conn, n.structured = conn, false
	n.secured()
	return nil
}

// refuse answers an option with an error. A client may try an option that the server does
// not support, and can do without it. Any other refusal is logged.
func (n *negotiation) refuse(opt option, rep optionReply, why string) error {
	if rep != repErrUnsup {
		n.refused = fmt.Errorf("option %d refused: %s", opt, why)
	}
	return n.reply(opt, rep, []byte(why))
}

func (n *negotiation) reply(opt option, rep optionReply, data []byte) error {
	be := binary.BigEndian
	b := be.AppendUint64(make([]byte, 0, 20+len(data)), magicOptionReply)
	b = be.AppendUint32(b, uint32(opt))
	b = be.AppendUint32(b, uint32(rep))
	b = be.AppendUint32(b, uint32(len(data)))
	_, err := n.conn.Write(append(b, data...))
	return err
}
