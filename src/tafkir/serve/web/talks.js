/* Conversations and settings, kept in this browser's localStorage, and files made of them. */
"use strict";

const store = {
  get(key, fallback) { try { return JSON.parse(localStorage.getItem(`tafkir.${key}`)) ?? fallback; } catch { return fallback; } },
  /** Whether it was kept: not where storage is full or forbidden. */
  set(key, value) { try { localStorage.setItem(`tafkir.${key}`, JSON.stringify(value)); return true; } catch { return false; } },
  drop(key) { localStorage.removeItem(`tafkir.${key}`); },
};

/* A conversation: {id, title, created, updated, model, turns}, times in ms since 1970. A turn is {role: "user", content}
   or {role: "assistant", content, reasoning, thoughtMs, end, usage, timings, seed}. */
const talks = {
  fresh: () => ({ id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`, title: "", created: Date.now(), updated: Date.now(), turns: [] }),
  all() {
    const found = [];
    for (let i = 0; i < localStorage.length; i++) {
      const key = localStorage.key(i);
      const talk = key.startsWith("tafkir.talk.") && store.get(key.slice(7), null);
      if (Array.isArray(talk?.turns)) found.push(talk);
    }
    return found.sort((a, b) => b.updated - a.updated);
  },
  save: (talk) => store.set(`talk.${talk.id}`, talk),
  remove: (talk) => store.drop(`talk.${talk.id}`),
  markdown(talk, words) {
    const parts = [`# ${talk.title || words.untitled}`, [talk.model, new Date(talk.created).toISOString()].filter(Boolean).join(" · ")];
    for (const turn of talk.turns) {
      parts.push(`## ${turn.role === "user" ? words.you : words.answer}`);
      if (turn.reasoning) parts.push(`> ${turn.reasoning.trim().replace(/\n/g, "\n> ")}`);
      parts.push(turn.content);
    }
    return `${parts.join("\n\n")}\n`;
  },
  download(name, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  },
};
