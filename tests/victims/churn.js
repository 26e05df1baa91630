// As churn.py, for Node: a lasting part, garbage, and checks of both until stdin ends.
"use strict";
const { createHash } = require("crypto");

const digest = (data) => createHash("sha1").update(data).digest("hex");
const lasting = [];
for (let n = 0; n < 16; n++) lasting.push(Buffer.alloc(1 << 20, `lasting block ${n} `));
const sums = lasting.map(digest);
const text = JSON.stringify(
    Array.from({ length: 20000 }, (_, n) => ({ id: n, name: `name ${n}`, list: [n, n + 1] })));
const sum = digest(text);
let parsed = JSON.parse(text), rounds = 0, over = false;

process.stdin.on("end", () => { over = true; });
process.stdin.resume();
console.log("ready");

function round() {
    rounds++;
    const which = rounds % lasting.length;
    if (digest(lasting[which]) !== sums[which]) throw new Error(`lasting block ${which}`);
    if (rounds % 8 === 0) {
        if (digest(JSON.stringify(parsed)) !== sum) throw new Error("objects");
        parsed = JSON.parse(text);
    }
    const garbage = [];
    for (let n = 0; n < 2000; n++) garbage.push(`garbage ${n} `.repeat(n % 20));
    if (garbage[1999] !== "garbage 1999 ".repeat(19)) throw new Error("garbage");
    if (over) console.log("OK", rounds); else setTimeout(round, 5);
}
round();
