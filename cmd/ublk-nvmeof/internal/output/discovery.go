package output

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"ublk-nvmeof/discovery"
	"ublk-nvmeof/nvme"
)

// field is a field of a discovery entry, with the spacing that nvme-cli gives its name.
type field struct {
	name  string // in JSON
	label string // in text
	value any    // string, or a number
	text  string // of a number
}

// Discovery writes a discovery log as nvme-cli 2.x does, in text and in JSON.
func Discovery(w io.Writer, log *discovery.Log, format string) error {
	if format == JSON {
		return discoveryJSON(w, log)
	}
	if _, err := fmt.Fprintf(w, "\nDiscovery Log Number of Records %d, Generation counter %d\n", len(log.Entries), log.Generation); err != nil {
		return err
	}
	for i := range log.Entries {
		if _, err := fmt.Fprintf(w, "=====Discovery Log Entry %d======\n", i); err != nil {
			return err
		}
		for _, f := range fields(&log.Entries[i]) {
			value := f.text
			if s, ok := f.value.(string); ok {
				value = Text(s)
			}
			if _, err := fmt.Fprintf(w, "%s%s\n", f.label, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// fields are the fields of an entry in nvme-cli's order.
func fields(e *discovery.Entry) []field {
	out := []field{
		{name: "trtype", label: "trtype:  ", value: e.TRTYPE().String()},
		{name: "adrfam", label: "adrfam:  ", value: e.ADRFAM().String()},
		{name: "subtype", label: "subtype: ", value: e.SUBTYPE().String()},
		{name: "treq", label: "treq:    ", value: e.TREQ().String()},
		{name: "portid", label: "portid:  ", value: e.PORTID(), text: fmt.Sprint(e.PORTID())},
		{name: "trsvcid", label: "trsvcid: ", value: e.TRSVCID()},
		{name: "subnqn", label: "subnqn:  ", value: e.NQN()},
		{name: "traddr", label: "traddr:  ", value: e.TRADDR()},
		{name: "eflags", label: "eflags:  ", value: e.EFLAGS().String()},
	}
	switch e.TRTYPE() {
	case nvme.TransportTCP:
		return append(out, field{name: "sectype", label: "sectype: ", value: e.TCPSecurity().String()})
	case nvme.TransportRDMA:
	default:
		return out
	}
	return append(out,
		field{name: "rdma_prtype", label: "rdma_prtype: ", value: e.RDMAProvider().String()},
		field{name: "rdma_qptype", label: "rdma_qptype: ", value: e.RDMAQPType().String()},
		field{name: "rdma_cms", label: "rdma_cms:    ", value: e.RDMACMS().String()},
		field{name: "rdma_pkey", label: "rdma_pkey: ", value: e.RDMAPKey(), text: fmt.Sprintf("0x%04x", e.RDMAPKey())},
	)
}

// discoveryJSON writes JSON with the layout of nvme-cli: indented by two spaces, and no
// space after a colon.
func discoveryJSON(w io.Writer, log *discovery.Log) error {
	var b strings.Builder
	fmt.Fprintf(&b, "{\n  \"genctr\":%d,\n  \"records\":[", log.Generation)
	for i := range log.Entries {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString("\n    {\n")
		all := fields(&log.Entries[i])
		for j, f := range all {
			value, err := jsonValue(f.value)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "      %q:%s", f.name, value)
			if j < len(all)-1 {
				b.WriteByte(',')
			}
			b.WriteByte('\n')
		}
		b.WriteString("    }")
	}
	if len(log.Entries) > 0 {
		b.WriteString("\n  ")
	}
	b.WriteString("]\n}\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// jsonValue is json.Marshal without the escapes for HTML.
func jsonValue(v any) (string, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return strings.TrimSuffix(b.String(), "\n"), err
}
