//go:build serf

package main

import (
	"io/ioutil"
	"log"
	"time"

	"github.com/hashicorp/serf/serf"
)

const eventsBuffered = 4096

type serfNode struct{ serf *serf.Serf }

// start configures the library as Serf's own agent does.
func start(name, host string, port int, profile string) (node, error) {
	config := serf.DefaultConfig()
	config.Init()
	silent := log.New(ioutil.Discard, "", 0)
	config.NodeName = name
	config.Tags = map[string]string{"v": "v0"}
	config.MemberlistConfig = preset(name, host, port, profile)
	config.Logger, config.MemberlistConfig.Logger = silent, silent
	config.LogOutput, config.MemberlistConfig.LogOutput = nil, nil
	config.CoalescePeriod, config.QuiescentPeriod = 3*time.Second, time.Second
	config.UserCoalescePeriod, config.UserQuiescentPeriod = 3*time.Second, time.Second
	config.EnableNameConflictResolution = true
	events := make(chan serf.Event, eventsBuffered)
	config.EventCh = events
	created, err := serf.Create(config)
	if err != nil {
		return nil, err
	}
	go follow(events)
	return &serfNode{created}, nil
}

func follow(events <-chan serf.Event) {
	kinds := map[serf.EventType]string{
		serf.EventMemberJoin:   "JOIN",
		serf.EventMemberLeave:  "LEAVE",
		serf.EventMemberFailed: "LEAVE",
		serf.EventMemberUpdate: "UPDATE",
		serf.EventMemberReap:   "REAP",
	}
	for event := range events {
		switch told := event.(type) {
		case serf.MemberEvent:
			for _, member := range told.Members {
				say(kinds[told.Type], member.Name, member.Tags["v"])
			}
		case serf.UserEvent:
			say("USER", "-", string(told.Payload))
		}
	}
}

func (n *serfNode) join(seeds []string) (int, error) { return n.serf.Join(seeds, true) }
func (n *serfNode) setMeta(text string)              { n.serf.SetTags(map[string]string{"v": text}) }
func (n *serfNode) broadcast(text string)            { n.serf.UserEvent("e", []byte(text), false) }

func (n *serfNode) members() int {
	alive := 0
	for _, member := range n.serf.Members() {
		if member.Status == serf.StatusAlive {
			alive++
		}
	}
	return alive
}

func (n *serfNode) leave() {
	n.serf.Leave()
	n.serf.Shutdown()
}
