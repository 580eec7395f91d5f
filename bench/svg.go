package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Sizes of a panel in a picture
const (
	panelWidth, panelHeight = 340, 230
	plotLeft, plotTop       = 62, 34
	plotWidth, plotHeight   = 258, 150
)

var lineColors = []string{"#1b6ca8", "#c2571a", "#3a7d44", "#7a4988"}

// scaleSVG draws throughput, memory and threads over the number of devices, one line for each
// number of queues.
func scaleSVG(points []scalePoint) string {
	panels := []struct {
		title string
		value func(scalePoint) float64
	}{
		{"thousand IOPS, all devices", func(p scalePoint) float64 { return p.IOPS / 1000 }},
		{"resident memory, MiB", func(p scalePoint) float64 { return float64(p.RSS) / (1 << 20) }},
		{"registered memory, MiB", func(p scalePoint) float64 { return float64(p.Pinned) / (1 << 20) }},
		{"threads", func(p scalePoint) float64 { return float64(p.Threads) }},
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="11">`+"\n",
		2*panelWidth, 2*panelHeight)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", 2*panelWidth, 2*panelHeight)
	for i, panel := range panels {
		fmt.Fprintf(&b, `<g transform="translate(%d,%d)">`+"\n", i%2*panelWidth, i/2*panelHeight)
		drawPanel(&b, panel.title, points, panel.value)
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func drawPanel(b *strings.Builder, title string, points []scalePoint, value func(scalePoint) float64) {
	most, devices, queues := 0.0, []int{}, []int{}
	for _, p := range points {
		most = max(most, value(p))
		devices, queues = append(devices, p.Devices), append(queues, p.Queues)
	}
	slices.Sort(devices)
	slices.Sort(queues)
	devices, queues = slices.Compact(devices), slices.Compact(queues)
	top := roundUp(most)
	widest := max(1, math.Log2(float64(devices[len(devices)-1])))
	x := func(n int) float64 { return plotLeft + plotWidth*math.Log2(float64(n))/widest }
	y := func(v float64) float64 { return plotTop + plotHeight*(1-v/top) }

	fmt.Fprintf(b, `<text x="%d" y="20" font-weight="bold">%s</text>`+"\n", plotLeft, title)
	for i := range 5 {
		v := top * float64(i) / 4
		fmt.Fprintf(b, `<path d="M%d %.1fh%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%g</text>`+"\n",
			plotLeft, y(v), plotWidth, plotLeft-6, y(v)+4, v)
	}
	for _, n := range devices {
		fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="middle">%d</text>`+"\n", x(n), plotTop+plotHeight+16, n)
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="middle">devices</text>`+"\n", plotLeft+plotWidth/2, plotTop+plotHeight+32)
	for i, q := range queues {
		color := lineColors[i%len(lineColors)]
		var line []string
		for _, p := range points {
			if p.Queues == q {
				line = append(line, fmt.Sprintf("%.1f,%.1f", x(p.Devices), y(value(p))))
			}
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(line, " "), color)
		fmt.Fprintf(b, `<text x="%d" y="%d" fill="%s">%d %s</text>`+"\n", plotLeft+8+i*64, plotTop+12, color, q, plural(q, "queue"))
	}
}

// roundUp returns the smallest of 1, 2, 4 or 8 times a power of ten that is not below v.
func roundUp(v float64) float64 {
	if v <= 0 {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(v)))
	for _, f := range []float64{1, 2, 4, 8} {
		if f*unit >= v {
			return f * unit
		}
	}
	return 10 * unit
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

// Sizes of the picture of stages
const (
	barLeft, barTop     = 190, 16
	barWidth, barHeight = 440, 16
	legendWidth         = 250
)

var stageColors = []string{
	"#c2571a", "#1b6ca8", "#7fb2d6", "#8a8f98", "#b9bec6", "#e0a458", "#e0c458", "#5c6570", "#3a7d44", "#cfd3d8", "#7a4988", "#eceef0",
}

// bar is the instructions of a workload over a path, by stage.
type bar struct {
	workload, path string
	stages         map[string]float64
}

// stagesSVG draws a bar for each workload and path, cut into stages. The bars of a workload are
// relative to the first of them.
func stagesSVG(bars []bar) string {
	var names []string
	for _, s := range stages {
		names = append(names, s.name)
	}
	names = append(names, otherStage)
	longest, whole := 1.0, make(map[string]float64)
	for _, b := range bars {
		if whole[b.workload] == 0 {
			whole[b.workload] = b.sum()
		}
		longest = max(longest, b.sum()/whole[b.workload])
	}
	unit := barWidth / longest
	legend := barTop + len(bars)*(barHeight+8) + 12
	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="11">`+"\n",
		barLeft+barWidth+60, legend+(len(names)+2)/3*18+8)
	out.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	for i, b := range bars {
		y := barTop + i*(barHeight+8)
		fmt.Fprintf(&out, `<text x="%d" y="%d" text-anchor="end">%s, %s</text>`+"\n", barLeft-8, y+12, b.workload, b.path)
		x := float64(barLeft)
		for j, name := range names {
			width := unit * b.stages[name] / whole[b.workload]
			fmt.Fprintf(&out, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`+"\n", x, y, width, barHeight, stageColors[j%len(stageColors)])
			x += width
		}
		fmt.Fprintf(&out, `<text x="%.1f" y="%d">%.2f</text>`+"\n", x+6, y+12, b.sum()/whole[b.workload])
	}
	for j, name := range names {
		x, y := 8+j%3*legendWidth, legend+j/3*18
		fmt.Fprintf(&out, `<rect x="%d" y="%d" width="11" height="11" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n",
			x, y, stageColors[j%len(stageColors)], x+16, y+10, name)
	}
	out.WriteString("</svg>\n")
	return out.String()
}

func (b bar) sum() float64 {
	sum := 0.0
	for _, n := range b.stages {
		sum += n
	}
	return sum
}
