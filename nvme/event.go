package nvme

import "fmt"

// AsyncEvent is dword 0 of the completion of an Asynchronous Event Request
// (Base, "Asynchronous Event Request").
//
//	0-2 type   8-15 information   16-23 log page
type AsyncEvent uint32

// NewAsyncEvent composes an event.
func NewAsyncEvent(t AsyncEventType, info, logPage uint8) AsyncEvent {
	return AsyncEvent(t&7) | AsyncEvent(info)<<8 | AsyncEvent(logPage)<<16
}

// AsyncEventType is the type of an event.
type AsyncEventType uint8

// Types of events
const (
	EventError     AsyncEventType = 0
	EventSMART     AsyncEventType = 1
	EventNotice    AsyncEventType = 2
	EventImmediate AsyncEventType = 3
	EventIOSet     AsyncEventType = 6 // specific to an I/O command set
	EventVendor    AsyncEventType = 7
)

// String returns the name of the type.
func (t AsyncEventType) String() string {
	switch t {
	case EventError:
		return "error"
	case EventSMART:
		return "health"
	case EventNotice:
		return "notice"
	case EventImmediate:
		return "immediate"
	case EventIOSet:
		return "i/o command set"
	case EventVendor:
		return "vendor"
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Information of EventError
const (
	ErrorInvalidDoorbell        = 0x00
	ErrorInvalidDoorbellValue   = 0x01
	ErrorDiagnosticFailure      = 0x02
	ErrorPersistentInternal     = 0x03
	ErrorTransientInternal      = 0x04
	ErrorFirmwareImageLoadError = 0x05
)

// Information of EventNotice
const (
	NoticeNamespaceChanged   = 0x00
	NoticeFirmwareActivation = 0x01
	NoticeTelemetry          = 0x02
	NoticeANAChanged         = 0x03
	NoticePredictableLatency = 0x04
	NoticeLBAStatus          = 0x05
	NoticeEnduranceGroup     = 0x06
	NoticeDiscoveryChanged   = 0xF0
)

// AEN bits: the events that a controller can announce ([IdentifyController.OAES]), and
// those that the host requests (CDW11 of FeatureAsyncEvent). Bits 0-7 of the latter are
// the critical warnings of [SMARTLog].
const (
	AENNamespaceAttribute = 1 << 8
	AENFirmwareActivation = 1 << 9
	AENTelemetry          = 1 << 10
	AENANAChange          = 1 << 11
	AENPredictableLatency = 1 << 12
	AENLBAStatus          = 1 << 13
	AENEnduranceGroup     = 1 << 14
	AENDiscoveryChange    = 1 << 31
)

// Type returns the type of the event.
func (e AsyncEvent) Type() AsyncEventType { return AsyncEventType(e & 7) }

// Info returns the information. Its meaning depends on the type.
func (e AsyncEvent) Info() uint8 { return uint8(e >> 8) }

// LogPage returns the log with details, or 0 if there is none. Reading the log enables
// the event again.
func (e AsyncEvent) LogPage() uint8 { return uint8(e >> 16) }

// String returns the event in words.
func (e AsyncEvent) String() string {
	words := ""
	switch e.Type() {
	case EventError:
		switch e.Info() {
		case ErrorInvalidDoorbell:
			words = "write to invalid doorbell"
		case ErrorInvalidDoorbellValue:
			words = "invalid doorbell value"
		case ErrorDiagnosticFailure:
			words = "diagnostic failure"
		case ErrorPersistentInternal:
			words = "persistent internal error"
		case ErrorTransientInternal:
			words = "transient internal error"
		case ErrorFirmwareImageLoadError:
			words = "firmware image load error"
		}
	case EventSMART:
		switch e.Info() {
		case 0:
			words = "subsystem reliability degraded"
		case 1:
			words = "temperature beyond threshold"
		case 2:
			words = "spare below threshold"
		}
	case EventNotice:
		switch e.Info() {
		case NoticeNamespaceChanged:
			words = "namespaces changed"
		case NoticeFirmwareActivation:
			words = "firmware activation starting"
		case NoticeTelemetry:
			words = "telemetry log changed"
		case NoticeANAChanged:
			words = "ana states changed"
		case NoticePredictableLatency:
			words = "predictable latency log changed"
		case NoticeLBAStatus:
			words = "lba status alert"
		case NoticeEnduranceGroup:
			words = "endurance group log changed"
		case NoticeDiscoveryChanged:
			words = "discovery log changed"
		}
	case EventImmediate:
		if e.Info() == 0 {
			words = "normal subsystem shutdown"
		}
	case EventIOSet:
		switch e.Info() {
		case 0:
			words = "reservation log available"
		case 1:
			words = "sanitize completed"
		case 2:
			words = "sanitize completed with unexpected deallocation"
		}
	}
	if words == "" {
		words = fmt.Sprintf("information %02xh", e.Info())
	}
	out := fmt.Sprintf("%v: %s", e.Type(), words)
	if e.LogPage() != 0 {
		out += fmt.Sprintf(" (log %02xh)", e.LogPage())
	}
	return out
}
