// Package station runs units over the heads of a manufacturing station: scan, wait, PASS, or one code with one next action.
//
// A [Station] makes one unit on one head with [Station.Make]: it probes the board, mints and stamps its identity (package mint), flashes
// it, reads it back, has it sign a challenge, prints its label and has that scanned, and seals the unit in the ledger. What
// cannot be undone comes last, each step is durable before the next, and a unit that was interrupted anywhere is taken up
// where it stopped when its serial is scanned again. Heads work at once and do not wait for one another.
//
// A [Desk] is a shift in front of a station: badge, checks, scans, functions, as a person goes through them. It is what a
// screen shows ([Desk.View]) and what a scanner talks to ([Desk.Input]). [Serve] is the same station for a machine: one JSON request
// a line.
//
// What is wrong is a [Code]. Its words are in package texts, beside this one.
package station
