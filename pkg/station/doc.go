// Package station runs units over the heads of a manufacturing station: scan, wait, PASS, or one code with one next action.
package station
