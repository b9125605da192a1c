/* The search runs in a worker, which browsers refuse to pages opened as files. There, run it in a hidden frame. */
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.frame = frame.contentWindow
      this.frame.document.open()
      this.frame.document.write("<script>" +
        "postMessage = data => parent.dispatchEvent(new MessageEvent('worker', { data }));" +
        "importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((loaded, failed) =>" +
        "  document.body.appendChild(Object.assign(document.createElement('script')," +
        "    { src: url, onload: loaded, onerror: failed })))), Promise.resolve())" +
        "</script><body><script src=\"" + url + "\"></script>")
      this.frame.document.close()
      window.addEventListener("worker", event => this.dispatchEvent(new MessageEvent("message", { data: event.data })))
    }
    postMessage(data) {
      const send = () => this.frame.dispatchEvent(new MessageEvent("message", { data }))
      this.frame.document.readyState === "complete" ? send() : this.frame.addEventListener("load", send)
    }
    terminate() { this.frame.frameElement.remove() }
  }
