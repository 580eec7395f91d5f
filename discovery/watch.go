package discovery

import (
	"context"
	"sync"
	"time"
)

// WatchConfig says how to watch a discovery service.
type WatchConfig struct {
	// Open connects to a service and stays connected, as a controller of
	// initiator.Config with a CtrlLoss below 0 does. changed is to be called whenever the
	// log may have changed (initiator.Config.DiscoveryChanged).
	Open func(ctx context.Context, at Endpoint, changed func()) (Conn, error)
	// Report hears of the first log of each service, of each log that differs from the one
	// before, and of each new error. It is called by one goroutine at a time, the one that
	// called Watch. After an error, the last log of the service stays what is known of it.
	Report func(Page)
	Limits Limits
	Settle time.Duration // wait for more changes after one, and up to 50 times as long if they do not end; 0: 200 ms
	Poll   time.Duration // read the log again although no event came; 0: 10 min
	Retry  time.Duration // after an error; 0: 10 s
}

// Watch keeps a connection to a service, and to all services that it refers to, directly or
// not, as long as it refers to them. It returns when ctx is done and all connections are
// closed.
func Watch(ctx context.Context, root Endpoint, cfg WatchConfig) {
	cfg.Limits = cfg.Limits.withDefaults()
	for _, f := range []struct {
		field *time.Duration
		value time.Duration
	}{{&cfg.Settle, 200 * time.Millisecond}, {&cfg.Poll, 10 * time.Minute}, {&cfg.Retry, 10 * time.Second}} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	w := &watcher{cfg: cfg, root: root, pages: make(chan Page), watches: map[Endpoint]*watch{}}
	defer w.running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.follow(ctx)
	for {
		select {
		case p := <-w.pages:
			if s := w.watches[p.From]; s != nil { // else it was given up meanwhile
				p.Depth = s.depth
				if p.Log != nil {
					s.refers = p.Referrals()
				}
				cfg.Report(p)
				w.follow(ctx)
			}
		case <-ctx.Done():
			return
		}
	}
}

// watcher is a running Watch.
type watcher struct {
	cfg     WatchConfig
	root    Endpoint
	pages   chan Page
	running sync.WaitGroup
	watches map[Endpoint]*watch
}

// watch is the connection to one service.
type watch struct {
	depth  int
	stop   context.CancelFunc
	refers []Endpoint // to other services
}

// follow starts to watch the services that are referred to by now, and gives up those that
// are not any more.
func (w *watcher) follow(ctx context.Context) {
	wanted := map[Endpoint]int{w.root: 0}
	for queue := []Endpoint{w.root}; len(queue) > 0; queue = queue[1:] {
		known := w.watches[queue[0]]
		if known == nil {
			continue
		}
		for _, at := range known.refers {
			depth := wanted[queue[0]] + 1
			if _, have := wanted[at]; !have && depth <= w.cfg.Limits.Depth && len(wanted) < w.cfg.Limits.Services {
				wanted[at] = depth
				queue = append(queue, at)
			}
		}
	}
	for at, s := range w.watches {
		if _, still := wanted[at]; !still {
			s.stop()
			delete(w.watches, at)
		}
	}
	for at, depth := range wanted {
		if s := w.watches[at]; s != nil {
			s.depth = depth
			continue
		}
		own, stop := context.WithCancel(ctx)
		w.watches[at] = &watch{depth: depth, stop: stop}
		w.running.Go(func() { w.watch(own, at) })
	}
}

// maxSettle is how many times the pause after a change may be WatchConfig.Settle.
const maxSettle = 50

// watch keeps the connection to one service until ctx is done.
func (w *watcher) watch(ctx context.Context, at Endpoint) {
	changed := make(chan struct{}, 1)
	note := func() {
		select {
		case changed <- struct{}{}:
		default: // it is to be read again already
		}
	}
	conn := w.connect(ctx, at, note)
	if conn == nil {
		return
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), w.cfg.Limits.Time)
		defer cancel()
		_ = conn.Close(end) // a service that is not left in order notices the end of the connection
	}()
	last := reported{}
	settle := w.cfg.Settle
	for {
		log, err := Read(ctx, conn, w.cfg.Limits)
		read := time.Now()
		if ctx.Err() != nil || last.isNews(log, err) && !w.send(ctx, Page{From: at, Log: log, Err: err}) {
			return
		}
		wait := w.cfg.Poll
		if err != nil {
			wait = w.cfg.Retry
		}
		select {
		case <-changed:
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		// A service that reports changes without end costs less and less.
		if time.Since(read) < settle {
			settle = min(2*settle, maxSettle*w.cfg.Settle)
		} else {
			settle = w.cfg.Settle
		}
		select {
		case <-time.After(settle):
		case <-ctx.Done():
			return
		}
		select {
		case <-changed: // covered by the next read
		default:
		}
	}
}

// connect connects to a service, again and again if it must. It returns nil if ctx is done.
func (w *watcher) connect(ctx context.Context, at Endpoint, changed func()) Conn {
	last := reported{}
	for {
		within, cancel := context.WithTimeout(ctx, w.cfg.Limits.Time)
		conn, err := w.cfg.Open(within, at, changed)
		cancel()
		if err == nil {
			return conn
		}
		if ctx.Err() != nil || last.isNews(nil, err) && !w.send(ctx, Page{From: at, Err: err}) {
			return nil
		}
		select {
		case <-time.After(w.cfg.Retry):
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *watcher) send(ctx context.Context, p Page) bool {
	select {
	case w.pages <- p:
		return true
	case <-ctx.Done():
		return false
	}
}

// reported is what was reported of a service last.
type reported struct {
	log *Log
	err string
}

// isNews reports whether a log or an error differs from the last one, and keeps it.
func (r *reported) isNews(log *Log, err error) bool {
	if err != nil {
		news := r.err != err.Error()
		r.err = err.Error()
		return news
	}
	news := r.log == nil || r.err != ""
	if !news {
		appeared, vanished := Diff(r.log.Entries, log.Entries)
		news = len(appeared)+len(vanished) > 0
	}
	r.log, r.err = log, ""
	return news
}
