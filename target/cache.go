package target

import (
	"errors"
	"io"
	"sync"
)

// cachePage is the size of a page of Cache. Pages are aligned, so the last page of a
// store may be shorter.
const cachePage = 4096

// Cache is a [Store] that behaves like a disk with a volatile write cache. Written data
// stays in the memory of this process until a flush, or until the cache is full, and is
// lost if the process ends without Close. A full cache writes back random pages.
type Cache struct {
	store Store
	limit int // pages

	mu    sync.Mutex
	dirty map[int64][]byte // by page number
}

// NewCache returns a cache of limit bytes, at least one page, in front of a store.
// Only the cache may use the store from now on.
func NewCache(store Store, limit int64) *Cache {
	return &Cache{store: store, limit: int(max(1, limit/cachePage)), dirty: make(map[int64][]byte)}
}

// Close flushes the cache, and closes the store if it is an [io.Closer].
func (c *Cache) Close() error {
	err := c.Flush()
	if s, ok := c.store.(io.Closer); ok {
		err = errors.Join(err, s.Close())
	}
	return err
}

// Size implements [Store].
func (c *Cache) Size() int64 { return c.store.Size() }

// pages splits p, which begins at offset off of the store, at page boundaries. It calls
// f for each part with the number of its page and its offset in the page.
func pages(p []byte, off int64, f func(page int64, at int, part []byte) error) error {
	for len(p) > 0 {
		at := int(off % cachePage)
		n := min(len(p), cachePage-at)
		if err := f(off/cachePage, at, p[:n]); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// ReadAt implements [Store].
func (c *Cache) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n, err := c.store.ReadAt(p, off); err != nil {
		return n, err
	}
	return len(p), pages(p, off, func(page int64, at int, part []byte) error {
		if have := c.dirty[page]; have != nil {
			copy(part, have[at:])
		}
		return nil
	})
}

// WriteAt implements [Store].
func (c *Cache) WriteAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if off < 0 || off+int64(len(p)) > c.store.Size() {
		return 0, errBeyondEnd
	}
	err := pages(p, off, func(page int64, at int, part []byte) error {
		have := c.dirty[page]
		if have == nil {
			have = make([]byte, min(cachePage, c.store.Size()-page*cachePage))
			if len(part) < len(have) {
				if _, err := c.store.ReadAt(have, page*cachePage); err != nil {
					return err
				}
			}
			c.dirty[page] = have
		}
		copy(have[at:], part)
		return nil
	})
	for page := range c.dirty { // in random order
		if err != nil || len(c.dirty) <= c.limit {
			break
		}
		err = c.writeBack(page)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// writeBack writes one page to the store. The caller holds the lock.
func (c *Cache) writeBack(page int64) error {
	// The store may have shrunk.
	data, off := c.dirty[page], page*cachePage
	data = data[:max(0, min(int64(len(data)), c.store.Size()-off))]
	if len(data) > 0 {
		if _, err := c.store.WriteAt(data, off); err != nil {
			return err
		}
	}
	delete(c.dirty, page)
	return nil
}

// Flush implements [Store].
func (c *Cache) Flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for page := range c.dirty {
		errs = append(errs, c.writeBack(page))
	}
	return errors.Join(append(errs, c.store.Flush())...)
}

// Discard implements [Store]. Like WriteZeroes, it changes the store at once.
func (c *Cache) Discard(off, length int64) error { return c.through(off, length, c.store.Discard) }

// WriteZeroes implements [Store].
func (c *Cache) WriteZeroes(off, length int64) error {
	return c.through(off, length, c.store.WriteZeroes)
}

// through writes back the cached pages of a range, and then calls change for the
// range.
func (c *Cache) through(off, length int64, change func(off, length int64) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	first, end := off/cachePage, (off+length+cachePage-1)/cachePage
	if end-first > int64(len(c.dirty)) {
		for page := range c.dirty {
			if first <= page && page < end {
				if err := c.writeBack(page); err != nil {
					return err
				}
			}
		}
		return change(off, length)
	}
	for page := first; page < end; page++ {
		if c.dirty[page] != nil {
			if err := c.writeBack(page); err != nil {
				return err
			}
		}
	}
	return change(off, length)
}
