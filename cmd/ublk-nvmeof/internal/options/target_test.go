package options

import (
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

func parseTarget(args ...string) (*Target, error) {
	o := DefaultTarget()
	f := pflag.NewFlagSet("target", pflag.ContinueOnError)
	o.AddFlags(f)
	if err := f.Parse(args); err != nil {
		return nil, FlagError(err)
	}
	return o, o.Complete()
}

func TestTargetFlags(t *testing.T) {
	o, err := parseTarget("-n", "nqn.a", "--max-io-size", "8KiB", "--memory-limit", "3GiB", "--namespaces-after", "10s", "--no-write-cache",
		"--quiesce-time", "1500ms", "--retry-delays", "1s,0s,6553.5s", "--keep-alive", "commands")
	if err != nil {
		t.Fatal(err)
	}
	if o.MaxIO != 8192 || o.Memory != 3<<30 || o.NamespacesAfter != 10*time.Second || !o.NoWriteCache || o.Quiesce != 1500*time.Millisecond ||
		o.RetryDelays != [3]time.Duration{time.Second, 0, 6553500 * time.Millisecond} || o.KeepAlive != Commands {
		t.Errorf("%+v", o)
	}
	for args, want := range map[string]string{
		"--max-io-size 4KiB":      "want a size like 64KiB, 8KiB to 1MiB",
		"--max-io-size 24KiB":     "want a power of two",
		"--queue-size 15":         "16 to 1024",
		"--queue-size 1025":       "16 to 1024",
		"--in-capsule-size 32KiB": "want 0, or a size like 64KiB, 16B to 16KiB",
		"-s 0":                    "want a port, 1 to 65535",
		"-s 65536":                "want a port, 1 to 65535",
		"-a 224.0.0.1":            "want an IPv4 or IPv6 address",
		"--allow-host x\x00y":     "contains a NUL",
		"--memory-limit 0":        "want a size like 64MiB",
		"--memory-limit 8EiB":     "want a size like 64MiB, up to 1PiB",
		"--namespaces-after 2h":   "0s to 1h0m0s",
		"--quiesce-time 66s":      "a multiple of 1ms up to 1m5.535s",
		"--quiesce-time 1us":      "a multiple of 1ms",
		"--retry-delays 1ms":      "a multiple of 100ms up to 1h49m13.5s",
		"--retry-delays 1s,,":     "one to three times",
		"--keep-alive none":       "traffic or commands",
	} {
		if _, err := parseTarget(append([]string{"-n", "nqn.a"}, strings.Fields(args)...)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}
