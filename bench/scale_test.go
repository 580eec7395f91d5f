package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

func TestNumbers(t *testing.T) {
	if got, err := numbers("1,4,16"); err != nil || len(got) != 3 || got[2] != 16 {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "0", "1,x", "1,,2"} {
		if got, err := numbers(bad); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

func TestScaleReport(t *testing.T) {
	points := []scalePoint{
		{Devices: 1, Queues: 1, IOPS: 7000, ServerPerIO: 50_000, RSS: 60 << 20, Pinned: 2 << 20, Threads: 11},
		{Devices: 64, Queues: 1, IOPS: 5000, ServerPerIO: 90_000, RSS: 200 << 20, Pinned: 128 << 20, Threads: 11, Sleeps: 0.2},
		{Devices: 1, Queues: 2, IOPS: 7100, ServerPerIO: 51_000, Threads: 12},
		{Devices: 64, Queues: 2, IOPS: 5100, ServerPerIO: 91_000, Threads: 12},
	}
	text := scaleMarkdown(environment{Series: "7.3"}, points)
	if want := "| 64 | 1 | 5,000 | 90.0 | 200 MiB | 128 MiB | 11 | 0.2 | 0.000 |"; !strings.Contains(text, want) {
		t.Errorf("%q is missing in\n%s", want, text)
	}
	picture := scaleSVG(points)
	wellFormed(t, picture)
	// The line of one queue goes from 1 device at the left to 64 at the right.
	if want := `points="62.0,52.8 320.0,90.2"`; !strings.Contains(picture, want) {
		t.Errorf("%q is missing in\n%s", want, picture)
	}
}

func wellFormed(t *testing.T, picture string) {
	t.Helper()
	for d := xml.NewDecoder(strings.NewReader(picture)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, picture)
		}
	}
}

func TestRoundUp(t *testing.T) {
	for v, want := range map[float64]float64{0: 1, 0.3: 0.4, 1: 1, 7.1: 8, 9: 10, 130: 200} {
		if got := roundUp(v); got != want {
			t.Errorf("%v: %v, want %v", v, got, want)
		}
	}
}
