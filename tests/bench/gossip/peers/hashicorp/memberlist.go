//go:build memberlist

package main

import (
	"io/ioutil"
	"log"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

const updateDeadline = 10 * time.Second

// events prints what the library tells; it calls from its own goroutines.
type events struct{}

func (events) NotifyJoin(n *memberlist.Node)   { say("JOIN", n.Name, string(n.Meta)) }
func (events) NotifyLeave(n *memberlist.Node)  { say("LEAVE", n.Name, "") }
func (events) NotifyUpdate(n *memberlist.Node) { say("UPDATE", n.Name, string(n.Meta)) }

// message is one broadcast; none replaces another.
type message []byte

func (message) Invalidates(memberlist.Broadcast) bool { return false }
func (m message) Message() []byte                     { return m }
func (message) Finished()                             {}

// listNode is the library's node and its delegate.
type listNode struct {
	list  *memberlist.Memberlist
	queue *memberlist.TransmitLimitedQueue
	lock  sync.Mutex
	meta  []byte
	seen  map[string]bool
}

func start(name, host string, port int, profile string) (node, error) {
	config := preset(name, host, port, profile)
	config.Logger = log.New(ioutil.Discard, "", 0)
	config.Events = events{}
	n := &listNode{meta: []byte("v0"), seen: map[string]bool{}}
	// The queue asks for the number of members only once there is something to send.
	n.queue = &memberlist.TransmitLimitedQueue{
		NumNodes:       func() int { return n.list.NumMembers() },
		RetransmitMult: config.RetransmitMult,
	}
	config.Delegate = n
	list, err := memberlist.Create(config)
	n.list = list
	return n, err
}

func (n *listNode) join(seeds []string) (int, error) { return n.list.Join(seeds) }
func (n *listNode) members() int                     { return n.list.NumMembers() }

func (n *listNode) setMeta(text string) {
	n.lock.Lock()
	n.meta = []byte(text)
	n.lock.Unlock()
	n.list.UpdateNode(updateDeadline)
}

func (n *listNode) broadcast(text string) {
	n.lock.Lock()
	n.seen[text] = true
	n.lock.Unlock()
	n.queue.QueueBroadcast(message(text))
}

func (n *listNode) leave() {
	n.list.Leave(updateDeadline)
	n.list.Shutdown()
}

// The delegate: metadata, and broadcasts passed on the first time they are seen.

func (n *listNode) NodeMeta(limit int) []byte {
	n.lock.Lock()
	defer n.lock.Unlock()
	return n.meta
}

func (n *listNode) NotifyMsg(received []byte) {
	text := string(received)
	n.lock.Lock()
	known := n.seen[text]
	n.seen[text] = true
	n.lock.Unlock()
	if !known {
		say("USER", "-", text)
		n.queue.QueueBroadcast(message(text))
	}
}

func (n *listNode) GetBroadcasts(overhead, limit int) [][]byte {
	return n.queue.GetBroadcasts(overhead, limit)
}

func (n *listNode) LocalState(join bool) []byte            { return nil }
func (n *listNode) MergeRemoteState(buf []byte, join bool) {}
