"""What this package knows: numbers. FLOPs and bytes of every op as expressions of its sizes (`ops`, `cost`), what
devices and links can do (`hardware`), and how the first become seconds and peak bytes on the second (`roofline`,
`collectives`, `memory`). It imports neither torch nor the other two packages; `errors` lives here because this is the
package that all others import.
"""
