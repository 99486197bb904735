// One node of a HashiCorp library in the gossip bench: NAME BIND_IP PORT PRESET on the command line, commands
// on standard input, events on standard output; events.py in the folder above describes the lines.
//
// The library is chosen when building: go build -tags memberlist, or -tags serf.
package main

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
)

// node is what the two libraries have in common.
type node interface {
	join(seeds []string) (int, error)
	setMeta(text string)
	broadcast(text string)
	members() int
	leave()
}

// say prints one event, now, in one write.
func say(kind, name, text string) {
	fmt.Fprintf(os.Stdout, "%d %s %s %s\n", time.Now().UnixNano(), kind, name, text)
}

// preset is the library's own configuration of that name, bound to an address.
func preset(name, host string, port int, profile string) *memberlist.Config {
	config := memberlist.DefaultLANConfig()
	switch profile {
	case "wan":
		config = memberlist.DefaultWANConfig()
	case "local":
		config = memberlist.DefaultLocalConfig()
	}
	config.Name = name
	config.BindAddr, config.AdvertiseAddr = host, host
	config.BindPort, config.AdvertisePort = port, port
	return config
}

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: NAME BIND_IP PORT PRESET")
		os.Exit(2)
	}
	name := os.Args[1]
	port, err := strconv.Atoi(os.Args[3])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	running, err := start(name, os.Args[2], port, os.Args[4])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	say("READY", name, "")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := append(strings.SplitN(lines.Text(), " ", 2), "")
		switch command, argument := words[0], words[1]; command {
		case "join":
			go func() {
				joined, err := running.join(strings.Split(argument, ","))
				say("JOINED", name, fmt.Sprint(joined, err))
			}()
		case "meta":
			say("SET", name, argument)
			go running.setMeta(argument)
		case "bcast":
			say("SET", name, argument)
			running.broadcast(argument)
		case "members":
			say("MEMBERS", name, strconv.Itoa(running.members()))
		case "leave":
			running.leave()
			return
		case "quit":
			return
		default:
			say("UNKNOWN", name, command)
		}
	}
}
