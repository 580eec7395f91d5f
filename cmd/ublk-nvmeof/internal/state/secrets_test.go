package state

import (
	"os"
	"path/filepath"
	"testing"
)

// Keys survive their server, nobody else can read them, and they go with the record.
func TestSecrets(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "run"))
	e := reserve(t, d, lab)
	want := Secrets{Host: "DHHC-1:00:a:", Controller: "DHHC-1:00:b:"}
	for _, s := range []Secrets{{}, want, {Host: "x"}, {}, want} {
		if err := e.SaveSecrets(s); err != nil {
			t.Fatal(err)
		}
		if got, err := e.Secrets(); err != nil || got != s {
			t.Errorf("%+v, %v; want %+v", got, err, s)
		}
	}
	file := filepath.Join(string(d), e.Name, secretsFile)
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	e.Process = deadProcess(t)
	if err := e.Save(); err != nil {
		t.Fatal(err)
	}
	next := reserve(t, d, lab)
	if got, err := next.Secrets(); err != nil || got != want || !next.Inherited {
		t.Errorf("the next server has %+v, %v", got, err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := next.Secrets(); err == nil {
		t.Error("damaged keys are accepted")
	}
	if err := next.Retire(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("the keys stay: %v", err)
	}
}
